"""Distributed Multilevel Euler-Maruyama sampling of diffusion models on Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlem_dist.api import generate, read, sample
    from mlem_dist.ladder.ladder import Ladder
    from mlem_dist.solver.plan import Plan

__all__ = ["Ladder", "Plan", "generate", "read", "sample"]

__version__ = "0.4.0"

_PLACES = {
    "Ladder": "mlem_dist.ladder.ladder",
    "Plan": "mlem_dist.solver.plan",
    "generate": "mlem_dist.api",
    "read": "mlem_dist.api",
    "sample": "mlem_dist.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and Ray take seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
