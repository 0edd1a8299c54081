"""Bisection."""

from __future__ import annotations

from collections.abc import Callable


def last_below(below: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number at which `below` holds, from `low` on, where it does, to `high`, where it does not."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
