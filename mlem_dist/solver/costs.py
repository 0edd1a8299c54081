"""Costs of levels, some of which share evaluations of models."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class LevelCosts:
    """Seconds per sample of a ladder's levels; an evaluation that several levels need at a step is made once.

    The same holds for bytes of weights: a model that several levels need is loaded once.

    Attributes:
        seconds: seconds per sample of each evaluation, or bytes of each model, float64 (E,).
        parts: whether each level needs each of them, bool (K, E).
    """

    seconds: np.ndarray
    parts: np.ndarray

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def alone(self) -> np.ndarray:
        """T_k, the cost of each level on its own, float64 (K,)."""
        return np.asarray(self.parts @ self.seconds)

    @property
    def increments(self) -> np.ndarray:
        """The cost of one increment of each level, float64 (K,): T_k + T_{k-1} less what both share."""
        below = np.concatenate([np.zeros_like(self.parts[:1]), self.parts[:-1]])
        return np.asarray((self.parts | below) @ self.seconds)

    @property
    def above(self) -> np.ndarray:
        """The cost of each level where all lower levels are evaluated too, float64 (K,)."""
        lower = np.logical_or.accumulate(self.parts, axis=0)
        known = np.concatenate([np.zeros_like(self.parts[:1]), lower[:-1]])
        return np.asarray((self.parts & ~known) @ self.seconds)

    def of(self, levels: Collection[int]) -> float:
        """The cost of evaluating several levels (from 1) at one step."""
        return float(self.parts[np.array(sorted(levels), dtype=np.int64) - 1].any(0) @ self.seconds)

    def of_calls(self, calls: np.ndarray) -> float:
        """The cost of calls of levels at the steps where `calls`, bool (K, N), is set."""
        made = (self.parts.T.astype(np.int64) @ calls) > 0
        return float(made.sum(1) @ self.seconds)

    def on(self, rungs: Sequence[int]) -> LevelCosts:
        """The costs of some levels, by their numbers from 1."""
        return LevelCosts(self.seconds, self.parts[np.array(rungs) - 1])


def as_costs(cost: np.ndarray | LevelCosts) -> LevelCosts:
    """Costs of levels that share nothing, if `cost` is an array (K,); else `cost`."""
    return cost if isinstance(cost, LevelCosts) else LevelCosts(cost, np.eye(len(cost), dtype=bool))
