"""Bisection."""

from __future__ import annotations

from collections.abc import Callable


def last_below(below: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number in [low, high) at which `below` holds; it holds at `low` and does not hold at `high`."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
