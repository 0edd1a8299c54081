"""Import of diffusers without the packages that take most of its time and memory, and that no level needs."""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR
from types import ModuleType
from typing import Any

METHODS = ("bitsandbytes", "torchao")
"""Methods of quantisation, which are names of packages, too."""

QUANTISATION = ("accelerate", *METHODS)
"""Packages that quantised models need: the first, and that of their method."""

UNUSED = ("peft", "scipy", "torchvision", "transformers", *QUANTISATION)
"""Packages that diffusers imports if they are installed. They take longer than all its other imports together."""

COMPILER = "torch._dynamo"
DECORATORS = ("allow_in_graph", "disable")
"""Decorators of torch's compiler that diffusers applies to functions that must not be compiled."""

_modules: dict[str, Any] = sys.modules


def hide_unused() -> None:
    """Hide the packages `UNUSED` from diffusers in this process, even if they are installed."""
    for name in UNUSED:
        _modules.setdefault(name, None)


def import_diffusers(quantised: bool = False) -> None:
    """Import diffusers without torch's compiler, which is as large as torch and diffusers together.

    For `quantised` models, the packages `QUANTISATION` are not hidden any longer.

    Do nothing if a package of `UNUSED` can be found, as it may need more of the compiler than `DECORATORS`.
    """
    for name in QUANTISATION if quantised else ():
        if _modules.get(name, name) is None:
            del _modules[name]
    if COMPILER in _modules or "diffusers" in _modules or any(map(find_spec, UNUSED)):
        return
    _modules[COMPILER] = nothing = ModuleType(COMPILER)
    nothing.__dict__.update(dict.fromkeys(DECORATORS, _unchanged))
    try:
        importlib.import_module("diffusers").UNet2DModel  # noqa: B018  # Diffusers imports it on access.
    except Exception:
        # This version needs more of the compiler: the next import of diffusers is a full one.
        for name in [name for name in _modules if name.partition(".")[0] == "diffusers"]:
            del _modules[name]
    finally:
        # Other code in this process can import the real compiler again.
        del _modules[COMPILER]


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that returns the function unchanged."""
    return (lambda decorated: decorated) if function is None else function


_quiet = threading.Lock()


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence progress bars and warnings of diffusers, and of transformers if it is in use, in this process.

    Errors are still shown. One thread at a time enters.
    """
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        libraries = [importlib.import_module("diffusers.utils.logging")]
        if _modules.get("transformers"):
            libraries.append(importlib.import_module("transformers.utils.logging"))
        before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in libraries]
        for logging in libraries:
            logging.set_verbosity(max(logging.get_verbosity(), ERROR))
            logging.disable_progress_bar()
        try:
            yield
        finally:
            for logging, verbosity, bars in before:
                logging.set_verbosity(verbosity)
                if bars:
                    logging.enable_progress_bar()
