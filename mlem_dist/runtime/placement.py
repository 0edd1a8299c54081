"""Which pools there are, and how many devices each gets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.runtime.job import Job
from mlem_dist.solver.plan import Increment, Plan, Recipe

# A pool of hardly any load still needs an actor, and an actor a share that a scheduler can count.
LEAST_SHARE = 0.05

CELL_DEVICES = 64
"""At most so many devices per coordinator; `forecast` takes fewer where it would be busy more than half of its time."""

WEIGHT_SHARE = 0.5
"""The share of a device's memory that weights may take; the rest is for activations and states."""

RARE = 1e-6
"""Evaluations counted for an increment that may be drawn, beside those of the blocks that are looked at."""

Together = tuple[Increment, ...]
"""The increments that are evaluated at one step."""

Evaluations = Mapping[Together, float]
"""How often, per sample, terms are evaluated together."""


@dataclass(frozen=True)
class Seat:
    """One actor's place: a share of one device, 0 < share <= 1."""

    device: int
    share: float


@dataclass(frozen=True, eq=False)
class Costs:
    """Seconds per sample of each level on some device, float64 (K,).

    Attributes:
        alone: evaluated on its own.
        beside: where level 1 is evaluated at the same state, and its value known.
    """

    alone: np.ndarray
    beside: np.ndarray

    def of(self, levels: Collection[int]) -> dict[int, float]:
        """By level (from 1), of those that one actor evaluates at one state."""
        each = self.beside if 1 in levels else self.alone
        return {k: float(each[k - 1]) for k in levels}


@dataclass(frozen=True)
class Placement:
    """The levels (from 1) of each pool, and each pool's kind of device; "" for whatever there is."""

    pools: tuple[range, ...]
    kinds: tuple[str, ...]


def parse_placement(text: str, levels: int) -> Placement:
    """The placement in a text: "pools" is one pool per level, "together" one for all, "1-2,3" as it says.

    Ranges may name kinds of devices, all of them or none: "1-2@L4,3@H100".

    Raises:
        UsageError: the ranges are not contiguous from 1 to the number of levels, or some have kinds and some not.
    """
    if text == "pools":
        return Placement(tuple(range(k, k + 1) for k in range(1, levels + 1)), ("",) * levels)
    if text == "together":
        return Placement((range(1, levels + 1),), ("",))
    parts = [part.partition("@") for part in text.split(",")]
    kinds = tuple(kind for _, _, kind in parts)
    try:
        ends = [tuple(map(int, part.split("-"))) for part, _, _ in parts]
        pools = tuple(range(first, last + 1) for first, last in (end * 2 if len(end) == 1 else end for end in ends))
    except ValueError:
        pools = ()
    if [k for pool in pools for k in pool] != list(range(1, levels + 1)) or not all(pools):
        raise UsageError(
            f"--placement {text!r}: expected pools, together, or contiguous ranges of levels 1 to {levels} such as "
            f"{'1-2,3' if levels > 2 else '1'}"
        )
    if any(kinds) != all(kinds) or any(at and not kind for _, at, kind in parts):
        raise UsageError(
            f"--placement {text!r}: expected a kind of device for every pool or for none, as in 1@L4,2@H100"
        )
    return Placement(pools, kinds)


@dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Attributes:
        type: "cpu" or "cuda".
        count: how many.
        labels: of their nodes, (key, value); none for any node.
    """

    type: str
    count: int
    labels: tuple[tuple[str, str], ...] = ()


def pools_text(pools: Sequence[range]) -> str:
    """Pools as `parse_placement` reads them: "1-2,3"."""
    return ",".join(f"{pool[0]}-{pool[-1]}" if len(pool) > 1 else str(pool[0]) for pool in pools)


def evaluations(job: Job) -> Evaluations:
    """What a job's plans evaluate per sample, averaged over its first; what these never do has a count near zero."""
    return _evaluations(job.plan, job.first_plans)


@lru_cache(maxsize=4)
def _evaluations(plan: Plan | Recipe, plans: Sequence[Plan]) -> Evaluations:
    counts: defaultdict[Together, float] = defaultdict(float)
    for run in (run for plan in plans for run in plan.runs):
        counts[tuple(term.increment for term in run.terms)] += 1
        # A run in closed form takes its own time, besides that of level 1 where it is evaluated.
        counts[(Increment(1, 0),)] += bool(run.base)
    counts.pop((), None)
    if isinstance(plan, Recipe):
        # A later block may draw what these do not, and must find a pool for it.
        rungs = plan.rungs or range(1, len(plan.probabilities) + 1)
        for below, level, p in zip((0, *rungs), rungs, plan.probabilities, strict=False):
            if p.any():
                counts[(Increment(level, below),)] += RARE
    return {together: count / len(plans) for together, count in counts.items()}


def level_loads(counts: Evaluations, pools: Sequence[range], costs: Sequence[Costs]) -> np.ndarray:
    """Expected seconds per sample in each pool and level, float64 (pools, K), for the costs on each pool's devices."""
    load = np.zeros((len(pools), len(costs[0].alone)))
    for together, count in counts.items():
        for index, (levels, here) in enumerate(zip(called(together, pools), costs, strict=True)):
            for k, seconds in here.of(levels).items():
                load[index, k - 1] += count * seconds
    return load


def divide(together: Together, pools: Sequence[range]) -> tuple[Together, ...]:
    """What each pool evaluates for the increments of one step, so that no two evaluate the same level if one is enough.

    The first pool holds the state, and takes part in every step. Where the level below an increment is one of its own,
    or one that its pool is asked for anyway, the increment's pool evaluates its level alone, over 0, and the first pool
    subtracts. Else the increment's pool evaluates both.
    """
    home = {k: index for index, pool in enumerate(pools) for k in pool}
    asked = {one.level for one in together}
    found: list[dict[Increment, None]] = [{} for _ in pools]
    for level, below in together:
        if below and home[below] != home[level] and (below in asked or home[below] == 0):
            found[home[level]][Increment(level, 0)] = None
            found[home[below]][Increment(below, 0)] = None
        else:
            found[home[level]][Increment(level, below)] = None
    return tuple(map(tuple, found))


def called(together: Together, pools: Sequence[range]) -> list[set[int]]:
    """The levels that each pool evaluates for the increments of one step."""
    return [{k for one in part for k in one.calls} for part in divide(together, pools)]


def levels_of(counts: Evaluations, pools: Sequence[range]) -> list[list[int]]:
    """The levels that each pool evaluates, by number."""
    parts = [called(together, pools) for together in counts]
    return [sorted(set().union(*levels)) for levels in zip(*parts, strict=True)]


def allot(load: np.ndarray, devices: int, trajectories: bool = True) -> list[list[Seat]]:
    """Seats per pool on `devices` devices, so that every device and every pool has the same load per device.

    McNaughton's wrap-around rule (Management Science 6, 1959): the pools' shares are laid end to end along the
    devices, and cut where a device ends. The first pool always has a seat if it holds the trajectories; another pool
    without load has none.
    """
    share = load / max(load.sum(), 1e-300) * devices
    needed = (load > 0) | (trajectories & (np.arange(len(load)) == 0))
    share = np.where(needed, np.maximum(share, LEAST_SHARE), 0)
    share *= devices / share.sum()
    seats: list[list[Seat]] = [[] for _ in load]
    at = 0.0
    for pool in np.flatnonzero(needed):
        end = min(at + share[pool], devices)
        while end - at > 1e-9:
            device = int(at + 1e-9)
            stop = min(device + 1, end)
            # Floor to what Ray counts, so that the seats of a device never exceed it.
            seat = Seat(device, math.floor((stop - at + 1e-9) * 1e4) / 1e4)
            # A sliver at a cut is not worth an actor when the pool has another seat.
            if seat.share >= LEAST_SHARE / 2 or (stop == end and not seats[pool]):
                seats[pool].append(seat)
            at = stop
    return seats


def allot_kinds(load: np.ndarray, kinds: Sequence[int], devices: Sequence[int]) -> list[list[Seat]]:
    """As `allot`, where pool i has devices of kind `kinds[i]` only, of which there are `devices[kind]`.

    The devices are numbered kind by kind. A kind whose pools have no load seats none of them but the first pool.
    """
    seats: list[list[Seat]] = [[] for _ in load]
    for kind, count in enumerate(devices):
        pools = [i for i, other in enumerate(kinds) if other == kind]
        if load[pools].any() or 0 in pools:
            first = sum(devices[:kind])
            for i, found in zip(pools, allot(load[pools], count, 0 in pools), strict=True):
                seats[i] = [Seat(seat.device + first, seat.share) for seat in found]
    return seats
