"""Diffusers, imported without what takes most of the time and memory of that, and which no level needs."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR
from types import ModuleType
from typing import Any

UNUSED = ("peft", "scipy", "torchvision", "transformers")
"""What diffusers imports where it is installed, for as long as all else that it imports."""

COMPILER = "torch._dynamo"
DECORATORS = ("allow_in_graph", "disable")
"""What diffusers takes of torch's compiler, to tell it what not to compile."""

_modules: dict[str, Any] = sys.modules


def hide_unused() -> None:
    """Let diffusers find none of `UNUSED`, in this process, whatever is installed."""
    for name in UNUSED:
        _modules.setdefault(name, None)


def import_diffusers() -> None:
    """Import it without torch's compiler, which is as large as torch and diffusers together.

    Not where others of `UNUSED` are found, which may want more of the compiler.
    """
    if COMPILER in _modules or "diffusers" in _modules or any(map(find_spec, UNUSED)):
        return
    _modules[COMPILER] = nothing = ModuleType(COMPILER)
    nothing.__dict__.update(dict.fromkeys(DECORATORS, _unchanged))
    try:
        importlib.import_module("diffusers").UNet2DModel  # noqa: B018  # It is imported when it is asked for.
    except Exception:
        # A version that takes more of it: whoever needs diffusers imports it whole.
        for name in [name for name in _modules if name.partition(".")[0] == "diffusers"]:
            del _modules[name]
    finally:
        # For who compiles something in this process: it is there again.
        del _modules[COMPILER]


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that does nothing."""
    return (lambda decorated: decorated) if function is None else function


_quiet = threading.Lock()


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence progress bars and warnings of diffusers in this process, not its errors; one thread at a time."""
    from diffusers.utils import logging

    with _quiet:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity(max(verbosity, ERROR))
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
