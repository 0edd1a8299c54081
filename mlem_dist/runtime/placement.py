"""Which pools there are, and how many devices each gets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.runtime.job import Job
from mlem_dist.solver.plan import Recipe

# A pool of hardly any load still needs an actor, and an actor a share that a scheduler can count.
LEAST_SHARE = 0.05

TRIP_SECONDS = {"cpu": 0.012, "cuda": 0.001}
"""Device time lost by one trip of a block's state to another pool and back; benchmarks/runtime/engines.py measures it
on CPU cores, which Ray's own work takes time from. On a GPU only the copies count, and their time is assumed."""

CELL_DEVICES = 64
"""At most so many devices per coordinator; `forecast` takes fewer where it would be busy more than half of its time."""

WEIGHT_SHARE = 0.5
"""The share of a device's memory that weights may take; the rest is for activations and states."""

RARE = 1e-6
"""Evaluations counted for an increment that may be drawn, beside those of the blocks that are looked at."""

Evaluations = Mapping[tuple[tuple[int, int], ...], float]
"""How often, per sample, terms are evaluated together at one step, by the (level, below) of each."""


@dataclass(frozen=True)
class Seat:
    """One actor's place: a share of one device, 0 < share <= 1."""

    device: int
    share: float


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
        pools = tuple(range(end[0], end[-1] + 1) for end in ends)
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
    """What a job's plans evaluate per sample, averaged over 16 blocks; what these never do has a count near zero."""
    counts: defaultdict[tuple[tuple[int, int], ...], float] = defaultdict(float)
    for run in (run for block in range(16) for run in job.block_plan(block).runs):
        counts[tuple((term.level, term.below) for term in run.terms)] += 1
        # A run in closed form takes its own time, besides that of level 1 where it is evaluated.
        counts[((1, 0),)] += bool(run.base)
    counts.pop((), None)
    if isinstance(job.plan, Recipe):
        # A later block may draw what these do not, and must find a pool for it.
        rungs = job.plan.rungs or range(1, len(job.plan.probabilities) + 1)
        for below, level, p in zip((0, *rungs), rungs, job.plan.probabilities, strict=False):
            if p.any():
                counts[((level, below),)] += RARE
    return {together: count / 16 for together, count in counts.items()}


def pool_loads(counts: Evaluations, pools: Sequence[range], cost: np.ndarray) -> np.ndarray:
    """Expected seconds per sample in each pool, float64, for level costs `cost` (K,)."""
    load = np.zeros(len(pools))
    for together, count in counts.items():
        for index, pool in enumerate(pools):
            called = {k for term in together if term[0] in pool for k in term if k}
            load[index] += count * sum(cost[k - 1] for k in called)
    return load


def levels_of(counts: Evaluations, pool: range) -> list[int]:
    """The levels that a pool evaluates: those of its terms and the ones that these are over, by number."""
    return sorted({k for together in counts for term in together if term[0] in pool for k in term if k})


def trips(counts: Evaluations, pools: Sequence[range]) -> float:
    """Expected trips of a block's state to other pools than the first."""
    return sum(
        count * sum(any(level in pool for level, _ in together) for pool in pools[1:])
        for together, count in counts.items()
    )


@dataclass(frozen=True)
class Candidate:
    """A placement with its predicted device seconds per sample, of which `lost` go into trips."""

    pools: tuple[range, ...]
    seconds: float
    lost: float

    def __str__(self) -> str:
        return pools_text(self.pools)


def candidates(job: Job, cost: np.ndarray, weights: np.ndarray, devices: int, memory: float) -> list[Candidate]:
    """Every placement that fits on `devices` devices of `memory` bytes each, the fastest first.

    An actor holds the weights of the levels that its pool evaluates; `weights` (K,) is the bytes of each in float32.
    Predicted are the levels' own seconds, for `cost` (K,) seconds per sample, and those that trips take.

    Raises:
        UsageError: no placement fits.
    """
    levels = len(cost)
    counts = evaluations(job)
    held_bytes = weights / 2 if job.precision == "bfloat16" else weights
    # A cell divides its own devices.
    of_cell = -(-devices // -(-devices // CELL_DEVICES))
    found = []
    for cuts in product((False, True), repeat=levels - 1):
        starts = [1, *(k + 2 for k, cut in enumerate(cuts) if cut), levels + 1]
        pools = tuple(map(range, starts, starts[1:]))
        load = pool_loads(counts, pools, cost)
        held = np.zeros(of_cell)
        for pool, seats in zip(pools, allot(load, of_cell), strict=True):
            for seat in seats:
                held[seat.device] += sum(held_bytes[k - 1] for k in levels_of(counts, pool))
        if held.max() <= WEIGHT_SHARE * memory:
            lost = trips(counts, pools) * TRIP_SECONDS[job.device] / job.block_size
            found.append(Candidate(pools, float(load.sum()) + lost, lost))
    if not found:
        raise UsageError(
            f"the ladder's weights take {weights.sum() / 2**30:.3g} GiB, and no placement of its levels fits on "
            f"{devices} devices of {memory / 2**30:.3g} GiB; use more devices or larger ones"
        )
    return sorted(found, key=lambda candidate: (candidate.seconds, len(candidate.pools)))


def allot(load: np.ndarray, devices: int) -> list[list[Seat]]:
    """Seats per pool on `devices` devices, so that every device and every pool has the same load per device.

    McNaughton's wrap-around rule (Management Science 6, 1959): the pools' shares are laid end to end along the
    devices, and cut where a device ends. The first pool holds the trajectories and always has a seat; another pool
    without load has none.
    """
    share = load / max(load.sum(), 1e-300) * devices
    needed = (load > 0) | (np.arange(len(load)) == 0)
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
            for i, found in zip(pools, allot(load[pools], count), strict=True):
                seats[i] = [Seat(seat.device + first, seat.share) for seat in found]
    return seats
