"""Programs: the work of a block on each pool, by its plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mlem_dist.engine.job import Workload
from mlem_dist.engine.progress import Work
from mlem_dist.solver.plan import Increment, Plan, Recipe

RARE_COUNT = 1e-6
"""Number of evaluations added, for each increment that may be drawn, to those in the plans of the first blocks."""

Together = tuple[Increment, ...]
"""Increments that are evaluated together, at one step."""

Evaluations = Mapping[Together, float]
"""Mean number of times per sample that each group of increments is evaluated together."""


@dataclass(frozen=True)
class Ask:
    """Increments of one step that a block needs from another pool before it can go on."""

    pool: int
    step: int
    increments: Together

    @property
    def calls(self) -> set[int]:
        """The levels that the pool evaluates for the ask."""
        return _levels(self.increments)


@dataclass(frozen=True)
class Turn:
    """A step that evaluates increments, or a run of steps that begins at that step and is taken in closed form.

    Attributes:
        step: the number of the step.
        own: increments that the first pool evaluates.
        asks: increments that other pools evaluate.
        closed: whether a run of steps from there on is taken in closed form, by level 1.
    """

    step: int
    own: Together
    asks: tuple[Ask, ...]
    closed: bool

    @property
    def calls(self) -> set[int]:
        """The levels that the first pool evaluates."""
        return _levels(self.own)


@dataclass(frozen=True)
class Segment:
    """Turns that the first pool takes without waiting for another pool, and the asks that follow them.

    The first turn of every segment but the first begins with the values that the segment before has asked for.
    """

    turns: tuple[Turn, ...]
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class SegmentEnd:
    """The end of a segment: the work done, and the asks that follow, which are empty if the block is finished."""

    work: Work
    asks: tuple[Ask, ...]


class Program:
    """A plan split over pools; workers, placement and simulation follow it.

    Args:
        plan: the plan of a block.
        pools: the levels (from 1) of each pool; the first pool holds the state, and takes part in every step.
    """

    def __init__(self, plan: Plan, pools: Sequence[range]) -> None:
        self.turns = tuple(_turn(step, together, closed, pools) for step, together, closed in _walk(plan))

    @cached_property
    def by_step(self) -> dict[int, Turn]:
        """The turn that begins at each step."""
        return {turn.step: turn for turn in self.turns}

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, in order; the last one has no asks."""
        segments: list[Segment] = []
        turns: list[Turn] = []
        for turn in self.turns:
            if turn.asks:
                segments.append(Segment(tuple(turns), turn.asks))
                turns = []
            turns.append(turn)
        return (*segments, Segment(tuple(turns), ()))


@lru_cache(maxsize=8)
def program_of(plan: Plan, pools: tuple[range, ...]) -> Program:
    """The program of a plan, cached for blocks that share their plan."""
    return Program(plan, pools)


def _walk(plan: Plan) -> Iterator[tuple[int, Together, bool]]:
    """Each run of a plan: its first step, the increments evaluated at it, and whether the run is in closed form."""
    for run in plan.runs:
        yield run.start, tuple(term.increment for term in run.terms), bool(run.base)


def _turn(step: int, together: Together, closed: bool, pools: Sequence[range]) -> Turn:
    own, *asked = divide(together, pools)
    return Turn(step, own, tuple(Ask(pool, step, part) for pool, part in enumerate(asked, 1) if part), closed)


def _levels(increments: Together) -> set[int]:
    return {level for increment in increments for level in increment.calls}


def divide(together: Together, pools: Sequence[range]) -> tuple[Together, ...]:
    """Split the increments of one step over the pools, so that two pools evaluate the same level only if they must.

    If the level below an increment belongs to the first pool, or its pool is asked for that level anyway, the
    increment's pool evaluates the increment's level alone, over 0, and the first pool subtracts. Otherwise the
    increment's pool evaluates both levels.
    """
    return _divide(together, tuple(pools))


@lru_cache(maxsize=4096)
def _divide(together: Together, pools: tuple[range, ...]) -> tuple[Together, ...]:
    home = {level: index for index, pool in enumerate(pools) for level in pool}
    called = {increment.level for increment in together}
    parts: list[dict[Increment, None]] = [{} for _ in pools]
    for level, below in together:
        if below and home[below] != home[level] and (below in called or home[below] == 0):
            parts[home[level]][Increment(level, 0)] = None
            parts[home[below]][Increment(below, 0)] = None
        else:
            parts[home[level]][Increment(level, below)] = None
    return tuple(map(tuple, parts))


def called(together: Together, pools: Sequence[range]) -> list[set[int]]:
    """The levels that each pool evaluates for the increments of one step."""
    return [_levels(part) for part in divide(together, pools)]


def evaluations(workload: Workload) -> Evaluations:
    """Mean number of times per sample that groups of increments are evaluated together, over the first blocks' plans.

    Increments that only later blocks may draw have a count near zero.
    """
    return _evaluations(workload.plan, workload.first_plans)


@lru_cache(maxsize=4)
def _evaluations(plan: Plan | Recipe, plans: Sequence[Plan]) -> Evaluations:
    counts: defaultdict[Together, float] = defaultdict(float)
    for _, together, closed in (run for plan in plans for run in _walk(plan)):
        counts[together] += 1
        # A run in closed form counts as a call of level 1, in addition to the calls of level 1 itself.
        counts[(Increment(1, 0),)] += closed
    counts.pop((), None)
    if isinstance(plan, Recipe):
        # A later block may draw increments that these plans lack, and must find a pool for them.
        rungs = plan.rungs or range(1, len(plan.probabilities) + 1)
        for below, level, p in zip((0, *rungs), rungs, plan.probabilities, strict=False):
            if p.any():
                counts[(Increment(level, below),)] += RARE_COUNT
    return {together: count / len(plans) for together, count in counts.items()}


def levels_of(counts: Evaluations, pools: Sequence[range]) -> list[list[int]]:
    """The numbers of the levels that each pool evaluates."""
    parts = [called(together, pools) for together in counts]
    return [sorted(set().union(*levels)) for levels in zip(*parts, strict=True)]
