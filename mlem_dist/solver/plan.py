"""Plans: which increments a block evaluates at which step, and with which weight each enters the drift."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlem_dist.errors import UsageError

Draw = Literal["independent", "systematic"]
Increments = Literal["impulse", "held"]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Term:
    """f^level - f^below evaluated at step `start`, with its weight in the drift of the steps start, start + 1, ...

    Levels count from 1; `below` = 0 stands for f^0 = 0.
    """

    level: int
    below: int
    start: int
    weights: tuple[float, ...]

    @property
    def stop(self) -> int:
        """The first step after `start` at which the value is no longer used."""
        return self.start + len(self.weights)


@dataclass(frozen=True, eq=False)
class Plan:
    """One draw of all coins.

    Attributes:
        fire: bool (K, N), whether level k's increment is evaluated at step i.
        weight: float64 (K, N), the weight in step i's drift of level k's latest evaluated increment.
    """

    fire: np.ndarray
    weight: np.ndarray

    @cached_property
    def terms(self) -> tuple[tuple[Term, ...], ...]:
        """Per step, the values to evaluate there, lowest level first.

        Neighbouring increments that fire together and keep equal weights telescope into one difference, so that
        Euler-Maruyama with the best level calls that level only. A value whose weights are all zero is not evaluated.
        """
        levels, steps = self.fire.shape
        by_step: list[list[Term]] = [[] for _ in range(steps)]
        for k in range(levels):
            fires = np.flatnonzero(self.fire[k])
            for start, stop in zip(fires, np.append(fires, steps)[1:], strict=True):
                weights = tuple(np.trim_zeros(self.weight[k, start:stop], "b").tolist())
                if not weights:
                    continue
                here = by_step[start]
                below = k
                if here and here[-1].level == k and here[-1].weights == weights:
                    below = here.pop().below
                here.append(Term(k + 1, below, int(start), weights))
        return tuple(map(tuple, by_step))

    @cached_property
    def calls(self) -> np.ndarray:
        """bool (K, N): which levels are called at each step."""
        called = np.zeros(self.fire.shape, dtype=bool)
        for i, terms in enumerate(self.terms):
            for term in terms:
                called[term.level - 1, i] = True
                if term.below:
                    called[term.below - 1, i] = True
        return called

    def nfe(self, cost: np.ndarray) -> float:
        """The plan's cost per sample in evaluations of the best level, for level costs `cost` (K,) in seconds."""
        return float(self.calls.sum(1) @ cost / cost[-1])


def draw_coins(p: np.ndarray, draw: Draw, rng: np.random.Generator) -> np.ndarray:
    """bool (K, N): coins that fall with probability p (K, N), independent between levels.

    "independent" coins are Bernoulli; "systematic" ones share one uniform u per level and fire where the running sum
    of p, plus u, passes a whole number: the same probability at every step, evenly spread. Their impulses are unbiased
    at every step; over a trajectory, where the coins of neighbouring steps depend on each other, only to first order.
    """
    if draw == "independent":
        return rng.random(p.shape) < p
    return systematic(p, rng.random(len(p)))


def systematic(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """bool (K, N): where floor(sum_{j <= i} p_k(j) + u_k) steps up, for u (K,) in [0, 1)."""
    # Sums of equal numbers a little below a whole one, by rounding, count as whole.
    sums = np.cumsum(np.pad(p, ((0, 0), (1, 0))), axis=1) + u[:, None] + 1e-9
    return np.diff(np.floor(sums), axis=1) > 0


def impulse(fire: np.ndarray, p: np.ndarray) -> Plan:
    """The estimator of ML-EM: each drawn increment enters its own step, divided by its probability. Unbiased."""
    return Plan(fire, np.divide(1.0, p, out=np.zeros(p.shape), where=fire))


def held(fire: np.ndarray) -> Plan:
    """Each increment enters with weight 1 from its evaluation until the next one.

    No variance, but biased: the error is of the order of what an increment changes between two evaluations.
    """
    return Plan(fire, np.maximum.accumulate(fire, axis=1).astype(np.float64))


def single_level(level: int, levels: int, steps: int) -> Plan:
    """Euler-Maruyama with one level (from 1) of a ladder of `levels`."""
    fire = np.zeros((levels, steps), dtype=bool)
    fire[:level] = True
    return Plan(fire, fire.astype(np.float64))


@dataclass(frozen=True, eq=False)
class Recipe:
    """How every block draws its own plan: probabilities p (K, N), the kind of coins and of increments."""

    probabilities: np.ndarray
    draw: Draw
    increments: Increments

    def plan(self, rng: np.random.Generator) -> Plan:
        """Draw a plan."""
        fire = draw_coins(self.probabilities, self.draw, rng)
        return impulse(fire, self.probabilities) if self.increments == "impulse" else held(fire)


def plan_to_dict(plan: Plan, ladder_digest: str, solver: str) -> dict[str, Any]:
    """A plan as JSON-ready values, with the ladder and solver that it is made for."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ladder": ladder_digest,
        "solver": solver,
        "steps": plan.fire.shape[1],
        "fire": plan.fire.astype(int).tolist(),
        "weight": plan.weight.tolist(),
    }


def plan_from_dict(raw: Mapping[str, Any], levels: int, where: str = "plan") -> Plan:
    """The plan in `raw`, for a ladder of `levels`.

    Raises:
        UsageError: unknown version, or arrays that are missing, of other shapes, or not finite.
    """
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{where}: schema_version is {raw.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    try:
        fire = np.array(raw["fire"], dtype=bool)
        weight = np.array(raw["weight"], dtype=np.float64)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{where}: fire and weight must be matrices of numbers ({error})") from None
    expected = (levels, raw.get("steps"))
    if fire.shape != expected or weight.shape != expected or not np.isfinite(weight).all():
        raise UsageError(f"{where}: fire {fire.shape} and weight {weight.shape} must be finite, of shape {expected}")
    return Plan(fire, weight)


def read_plan(path: Path, ladder_digest: str, levels: Sequence[str], solver: str, steps: int) -> Plan:
    """Read a plan's JSON file, for use with this ladder, solver and number of steps.

    Raises:
        UsageError: the file is missing or no plan, or it was made for another ladder, solver or number of steps.
    """
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"plan {path} is missing") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"plan {path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"plan {path} is not a JSON object")
    for key, expected in (("ladder", ladder_digest), ("solver", solver), ("steps", steps)):
        if raw.get(key) != expected:
            raise UsageError(
                f"plan {path} was made for another {key}: {str(raw.get(key))[:19]}, not {str(expected)[:19]}; "
                "draw one with `mlem-dist draw`"
            )
    return plan_from_dict(raw, len(levels), f"plan {path}")
