"""Which pools there are, and how many devices each gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.runtime.job import Job

# A pool of hardly any load still needs an actor, and an actor a share that a scheduler can count.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Seat:
    """One actor's place: a share of one device, 0 < share <= 1."""

    device: int
    share: float


def parse_placement(text: str, levels: int) -> tuple[range, ...]:
    """The levels (from 1) of each pool: "pools" is one pool per level, "together" one for all, "1-2,3" as it says.

    Raises:
        UsageError: the ranges are not contiguous from 1 to the number of levels.
    """
    if text == "pools":
        return tuple(range(k, k + 1) for k in range(1, levels + 1))
    if text == "together":
        return (range(1, levels + 1),)
    try:
        ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        pools = tuple(range(end[0], end[-1] + 1) for end in ends)
    except ValueError:
        pools = ()
    if [k for pool in pools for k in pool] != list(range(1, levels + 1)) or not all(pools):
        raise UsageError(
            f"--placement {text!r}: expected pools, together, or contiguous ranges of levels 1 to {levels} such as "
            f"{'1-2,3' if levels > 2 else '1'}"
        )
    return pools


def pool_loads(job: Job, pools: Sequence[range], cost: np.ndarray) -> np.ndarray:
    """Expected seconds per sample in each pool, float64, for level costs `cost` (K,); averaged over 16 blocks."""
    load = np.zeros(len(pools))
    for block in range(16):
        for terms in job.block_plan(block).terms:
            for index, pool in enumerate(pools):
                called = {k for term in terms if term.level in pool for k in (term.level, term.below) if k}
                load[index] += sum(cost[k - 1] for k in called) / 16
    return load


def allot(load: np.ndarray, devices: int) -> list[list[Seat]]:
    """Seats per pool on `devices` devices, so that every device and every pool has the same load per device.

    McNaughton's wrap-around rule (Management Science 6, 1959): the pools' shares are laid end to end along the
    devices, and cut where a device ends. The first pool holds the trajectories and always has a seat; another pool
    without load has none.
    """
    share = load / load.sum() * devices
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
