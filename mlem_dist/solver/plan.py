"""Plans: the increments that a block evaluates at each step, and their weights in the drift."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.files import read_object, replace_file
from mlem_dist.solver.costs import LevelCosts, as_costs
from mlem_dist.solver.steps import ALIASES

Draw = Literal["independent", "systematic", "quantiles"]
Increments = Literal["impulse", "held", "extrapolated"]
SCHEMA_VERSION = 2


class Increment(NamedTuple):
    """The difference f^level - f^below. Levels count from 1; `below` = 0 stands for f^0 = 0."""

    level: int
    below: int

    @property
    def calls(self) -> tuple[int, ...]:
        """The levels that the increment evaluates."""
        return (self.below, self.level) if self.below else (self.level,)


@dataclass(frozen=True)
class Term:
    """An increment evaluated at step `start`, with its weights in the drift of the steps start, start + 1, ..."""

    level: int
    below: int
    start: int
    weights: tuple[float, ...]

    @property
    def increment(self) -> Increment:
        """The increment f^level - f^below."""
        return Increment(self.level, self.below)

    @property
    def calls(self) -> tuple[int, ...]:
        """The levels that the increment evaluates."""
        return self.increment.calls

    @property
    def stop(self) -> int:
        """The first step after `start` that does not use the value."""
        return self.start + len(self.weights)

    def weights_at(self, start: int, stop: int) -> tuple[float, ...]:
        """The weights in the steps start ... stop - 1; zero from the term's own `stop` on."""
        weights = self.weights[start - self.start : stop - self.start]
        return weights + (0.0,) * (stop - start - len(weights))


@dataclass(frozen=True)
class Run:
    """The steps start ... stop - 1, of which only the first evaluates `terms`.

    If `base` is not empty, the steps are taken in closed form, and `base` holds the weight of level 1 in each of them.
    """

    start: int
    stop: int
    terms: tuple[Term, ...]
    base: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """The outcome of one draw of all coins.

    Attributes:
        fire: bool (K, N), whether level k's increment is evaluated at step i.
        weight: float64 (K, N), the weight of level k's latest evaluated increment in the drift of step i.
        previous: float64 (K, N), the weight of the increment evaluated before that.
        collapse: whether runs of steps that evaluate level 1 alone are taken in closed form. Level 1 must then be
            affine in x.
    """

    fire: np.ndarray
    weight: np.ndarray
    previous: np.ndarray
    collapse: bool = False

    @cached_property
    def terms(self) -> tuple[tuple[Term, ...], ...]:
        """The terms to evaluate at each step, lowest level first.

        Neighbouring increments that fire together and keep equal weights telescope into one difference, so that
        Euler-Maruyama with the best level calls that level only. A term whose weights are all zero is left out.
        """
        levels, steps = self.fire.shape
        by_step: list[list[Term]] = [[] for _ in range(steps)]
        # Lists, not arrays: numpy takes tens of microseconds for each of some hundred short slices.
        weight, previous = self.weight.tolist(), self.previous.tolist()
        for k in range(levels):
            ends = [*np.flatnonzero(self.fire[k]), steps, steps]
            for start, stop, end in zip(ends, ends[1:], ends[2:], strict=False):
                entries = weight[k][start:stop] + previous[k][stop:end]
                while entries and not entries[-1]:
                    entries.pop()
                if not entries:
                    continue
                weights = tuple(entries)
                terms = by_step[start]
                below = k
                if terms and terms[-1].level == k and terms[-1].weights == weights:
                    below = terms.pop().below
                terms.append(Term(k + 1, below, int(start), weights))
        return tuple(map(tuple, by_step))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs in order: single steps or, with `collapse`, steps of level 1 alone joined to the step before."""
        joined: list[Run] = []
        for i, terms in enumerate(self.terms):
            base = terms[0].weights if terms and (terms[0].level, terms[0].below) == (1, 0) else ()
            if not self.collapse or len(base) != 1:
                joined.append(Run(i, i + 1, terms))
            elif joined and joined[-1].base and len(terms) == 1:
                last = joined.pop()
                joined.append(Run(last.start, i + 1, last.terms, last.base + base))
            else:
                joined.append(Run(i, i + 1, terms[1:], base))
        return tuple(joined)

    @property
    def steps(self) -> int:
        """N, the number of base steps."""
        return int(self.fire.shape[1])

    @cached_property
    def calls(self) -> np.ndarray:
        """Whether each level is called at each step, bool (K, N); a run in closed form does not call level 1."""
        called = np.zeros(self.fire.shape, dtype=bool)
        for run in self.runs:
            for number in {k for term in run.terms for k in term.calls}:
                called[number - 1, run.start] = True
        return called

    def nfe(self, cost: np.ndarray | LevelCosts) -> float:
        """The plan's cost per sample in evaluations of the best level, for level costs in seconds.

        `cost` is float64 (K,) for levels that share no evaluations.

        A run in closed form costs about as much as a call of level 1.
        """
        closed = sum(bool(run.base) for run in self.runs)
        costs = as_costs(cost)
        alone = costs.alone
        return float((costs.of_calls(self.calls) + closed * alone[0]) / alone[-1])


def draw_coins(p: np.ndarray, draw: Draw, rng: np.random.Generator) -> np.ndarray:
    """Coins that fire with probability p (K, N), independent between levels: bool (K, N).

    "independent" coins are Bernoulli. "systematic" coins share one uniform u per level. They fire where the running sum
    of p, plus u, passes a whole number, so that each step keeps its probability and evaluations are evenly spread.
    Their impulses are unbiased at every step. Over a trajectory they are unbiased only to first order, as the coins of
    neighbouring steps depend on each other. "quantiles" are systematic coins with the fixed u = 1/2: level k fires at
    the quantiles (j + 1/2) / sum p_k of the density p_k / sum p_k.
    """
    if draw == "independent":
        return rng.random(p.shape) < p
    return systematic(p, rng.random(len(p)) if draw == "systematic" else np.full(len(p), 0.5))


def systematic(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Whether floor(sum_{j <= i} p_k(j) + u_k) grows at step i, for u (K,) in [0, 1): bool (K, N)."""
    # The 1e-9 counts sums that rounding has left just below a whole number as whole.
    sums = np.cumsum(np.pad(p, ((0, 0), (1, 0))), axis=1) + u[:, None] + 1e-9
    return np.diff(np.floor(sums), axis=1) > 0


def nest(fire: np.ndarray) -> np.ndarray:
    """Coins (K, N) moved, level by level, to the nearest steps at which the level below fires.

    An increment then finds the value of the level below in that level's own increment.
    """
    nested = fire.copy()
    for below, row in pairwise(nested):
        at, steps = np.flatnonzero(row), np.flatnonzero(below)
        row[:] = False
        if at.size and steps.size:
            row[steps[np.abs(at[:, None] - steps).argmin(1)]] = True
    return nested


def impulse(fire: np.ndarray, p: np.ndarray) -> Plan:
    """The plan of ML-EM's unbiased estimator: a drawn increment enters its own step, divided by its probability."""
    return Plan(fire, np.divide(1.0, p, out=np.zeros(p.shape), where=fire), np.zeros(p.shape))


def held(fire: np.ndarray) -> Plan:
    """The plan in which each increment enters with weight 1 from its evaluation until the next.

    It has no variance, but a bias: the error is of the order of an increment's change between two evaluations.
    """
    weight = np.maximum.accumulate(fire, axis=1).astype(np.float64)
    return Plan(fire, weight, np.zeros(fire.shape))


def extrapolated(fire: np.ndarray, log_snr: np.ndarray, reach: Sequence[float] | None = None) -> Plan:
    """The plan that extrapolates each increment linearly in lambda, up to one gap beyond its last evaluation.

    Let v_l be the last evaluation up to step i and v_p the evaluation before it. The increment of level k enters as
    v_l + r (v_l - v_p), r = reach_k min(1, (lambda_i - lambda_l) / (lambda_l - lambda_p)). Until two evaluations exist,
    it is held. The bias is of the order of the increment's second derivative times the square of the gap.

    Args:
        fire: bool (K, N), whether level k's increment is evaluated at step i.
        log_snr: lambda, float64 (N,), finite and increasing, as in `Grid.finite_log_snr`.
        reach: factor for each row of `fire`; 1 for all by default, and 0 holds the increment.
    """
    weight, previous = held(fire).weight, np.zeros(fire.shape)
    for k, fires in enumerate(map(np.flatnonzero, fire)):
        for before, last, stop in zip(fires, fires[1:], [*fires[2:], fire.shape[1]], strict=False):
            ahead = (log_snr[last:stop] - log_snr[last]) / (log_snr[last] - log_snr[before])
            previous[k, last:stop] = -np.minimum(1.0, ahead) * (1.0 if reach is None else reach[k])
    return Plan(fire, weight - previous, previous)


def single_level(level: int, levels: int, steps: int) -> Plan:
    """The plan of Euler-Maruyama with one level (from 1) of a ladder of `levels`."""
    fire = np.zeros((levels, steps), dtype=bool)
    fire[:level] = True
    return Plan(fire, fire.astype(np.float64), np.zeros(fire.shape))


def switched(small: int, large: int, levels: int, steps: int, at: int) -> Plan:
    """The plan of Euler-Maruyama with level `small` before step `at`, then `large` (T-Stitch, arXiv:2402.14167).

    It is biased: before step `at`, the drift has the error of the small level at any number of steps.
    """
    fire = np.zeros((levels, steps), dtype=bool)
    fire[:small] = True
    fire[:large, at:] = True
    return Plan(fire, fire.astype(np.float64), np.zeros(fire.shape))


def on_levels(plan: Plan, rungs: Sequence[int]) -> Plan:
    """The plan for all levels that equals a plan whose rows are `rungs`, level numbers from 1 up to the best level.

    A skipped level copies the row of the next rung, as neighbouring increments of equal weights form one difference.
    """
    rows = np.searchsorted(rungs, np.arange(1, rungs[-1] + 1))
    return Plan(plan.fire[rows], plan.weight[rows], plan.previous[rows], plan.collapse)


@dataclass(frozen=True, eq=False)
class Recipe:
    """The distribution from which every block draws its own plan.

    Attributes:
        probabilities: p, float64 (R, N), of the levels in `rungs`.
        draw: the kind of coins.
        increments: how a drawn increment enters the steps.
        collapse: as in `Plan`.
        log_snr: as for `extrapolated`; only extrapolated increments need it.
        rungs: numbers of the levels in use, from 1, increasing up to the best; None for all. With rungs, an increment
            is the difference of neighbouring rungs, and levels between them are not called.
        reach: factor of extrapolated increments for each rung; None for 1.
        nested: whether each rung's coins are moved to those of the rung below, by `nest`.
    """

    probabilities: np.ndarray
    draw: Draw
    increments: Increments
    collapse: bool = False
    log_snr: np.ndarray | None = None
    rungs: tuple[int, ...] | None = None
    reach: tuple[float, ...] | None = None
    nested: bool = False

    @property
    def steps(self) -> int:
        """N, the number of base steps."""
        return int(self.probabilities.shape[1])

    def plan(self, rng: np.random.Generator) -> Plan:
        """Draw a plan."""
        fire = draw_coins(self.probabilities, self.draw, rng)
        if self.nested:
            fire = nest(fire)
        if self.increments == "impulse":
            plan = impulse(fire, self.probabilities)
        elif self.increments == "held":
            plan = held(fire)
        else:
            assert self.log_snr is not None
            plan = extrapolated(fire, self.log_snr, self.reach)
        plan = replace(plan, collapse=self.collapse)
        return plan if self.rungs is None else on_levels(plan, self.rungs)


def recipe_from_dict(raw: Mapping[str, Any]) -> Recipe:
    """The recipe whose fields, with lists for arrays and tuples, are in `raw`."""
    arrays = {name: np.array(raw[name]) for name in ("probabilities", "log_snr") if raw[name] is not None}
    tuples = {name: tuple(raw[name]) for name in ("rungs", "reach") if raw[name] is not None}
    return Recipe(**{**raw, **arrays, **tuples})


def block_rng(seed: int, block: int) -> np.random.Generator:
    """The random generator of a block's coins, which depends on (seed, block) alone."""
    return np.random.default_rng([seed, block])


def plan_to_dict(plan: Plan, ladder_digest: str, solver: str) -> dict[str, Any]:
    """A plan as JSON-ready values, with the digest of its ladder and its solver."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ladder": ladder_digest,
        "solver": solver,
        "steps": plan.fire.shape[1],
        "fire": plan.fire.astype(int).tolist(),
        "weight": plan.weight.tolist(),
        "previous": plan.previous.tolist(),
        "collapse": plan.collapse,
    }


def plan_from_dict(raw: Mapping[str, Any], levels: int, where: str = "plan") -> Plan:
    """The plan in `raw`, for a ladder of `levels`.

    Raises:
        UsageError: if the schema version is unknown, or an array is missing, has another shape or is not finite.
    """
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{where}: schema_version is {raw.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    try:
        fire = np.array(raw["fire"], dtype=bool)
        weight = np.array(raw["weight"], dtype=np.float64)
        previous = np.array(raw["previous"], dtype=np.float64)
        collapse = bool(raw["collapse"])
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{where}: fire, weight and previous must be matrices of numbers ({error})") from None
    expected = (levels, raw.get("steps"))
    for name, matrix in (("fire", fire), ("weight", weight), ("previous", previous)):
        if matrix.shape != expected or not np.isfinite(matrix).all():
            raise UsageError(f"{where}: {name} {matrix.shape} must be finite numbers, of shape {expected}")
    return Plan(fire, weight, previous, collapse)


def write_plan(path: Path, plan: Plan, ladder_digest: str, solver: str) -> None:
    """Write a plan atomically as the JSON file that `read_plan` reads."""
    replace_file(path, json.dumps(plan_to_dict(plan, ladder_digest, solver)) + "\n")


def read_plan(path: Path, ladder_digest: str, levels: int, solver: str, steps: int | None) -> Plan:
    """The plan in a JSON file, for a ladder of `levels`, a solver, and `steps` steps (any number if None).

    Raises:
        UsageError: if the file is missing or not a plan, or is for another ladder, solver or number of steps.
    """
    raw = read_object(path, "plan")
    if raw.get("solver") in ALIASES:
        raw["solver"] = ALIASES[raw["solver"]]
    for key, expected in (("ladder", ladder_digest), ("solver", solver), ("steps", steps)):
        if expected is not None and raw.get(key) != expected:
            raise UsageError(
                f"plan {path} was made for another {key}: {str(raw.get(key))[:19]}, not {str(expected)[:19]}; "
                "make one by `mlem-dist draw` or `tune`, or move the file away"
            )
    return plan_from_dict(raw, levels, f"plan {path}")
