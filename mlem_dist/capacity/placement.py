"""Placements: the levels of each pool, and the shares of devices that each pool gets."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlem_dist.engine.program import Evaluations, called
from mlem_dist.errors import UsageError
from mlem_dist.solver.costs import LevelCosts

# A pool with hardly any load still needs an actor, and an actor needs a share that a scheduler can count.
LEAST_SHARE = 0.05

CELL_DEVICES = 64
"""Largest number of devices per coordinator; `forecast` takes fewer if a coordinator is busy over half its time."""

SCORE = "score"
"""Name of the stage of scores, which has a pool of its own with any placement."""


@dataclass(frozen=True)
class Seat:
    """An actor's place: a share of one device, 0 < share <= 1."""

    device: int
    share: float


@dataclass(frozen=True, eq=False)
class Costs:
    """Seconds per sample of each level on a kind of device, float64 (K,).

    Attributes:
        alone: time of a level that is evaluated on its own.
        beside: time of a level if level 1 is evaluated at the same state, so that its value is known.
        stages: seconds per sample of each stage: "encode" for prompts, "decode" for latents, "score" for images.
        stage_bytes: bytes of the weights of each stage.
        shared: costs of levels that share evaluations in one actor; None if they take level 1's value at most.
    """

    alone: np.ndarray
    beside: np.ndarray
    stages: Mapping[str, float] = field(default_factory=dict)
    stage_bytes: Mapping[str, float] = field(default_factory=dict)
    shared: LevelCosts | None = None

    def of(self, levels: Collection[int]) -> dict[int, float]:
        """Seconds per sample of each of the `levels` (from 1), which one actor evaluates at one state."""
        if self.shared:
            numbers = sorted(levels)
            return dict(zip(numbers, self.shared.on(numbers).above.tolist(), strict=True)) if numbers else {}
        each = self.beside if 1 in levels else self.alone
        return {k: float(each[k - 1]) for k in levels}


@dataclass(frozen=True)
class Placement:
    """The levels (from 1) of each pool, and each pool's kind of device; "" for any device."""

    pools: tuple[range, ...]
    kinds: tuple[str, ...]


def parse_placement(text: str, levels: int) -> Placement:
    """The placement in a text: "pools" is one pool per level, "together" one for all, "1-2,3" one per range.

    Ranges may name kinds of devices, all of them or none: "1-2@L4,3@H100".

    Raises:
        UsageError: if the ranges are not contiguous from 1 to the number of levels, or if only some of them have kinds.
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
            f"`placement` {text!r}: expected pools, together, or contiguous ranges of levels 1 to {levels} such as "
            f"{'1-2,3' if levels > 2 else '1'}"
        )
    if any(kinds) != all(kinds) or any(at and not kind for _, at, kind in parts):
        raise UsageError(
            f"`placement` {text!r}: expected a kind of device for every pool or for none, as in 1@L4,2@H100"
        )
    return Placement(pools, kinds)


@dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Attributes:
        type: "cpu" or "cuda".
        count: number of devices.
        labels: labels that their nodes must have, as (key, value); empty for any node.
    """

    type: str
    count: int
    labels: tuple[tuple[str, str], ...] = ()


def pools_text(pools: Sequence[range]) -> str:
    """Pools as `parse_placement` reads them: "1-2,3"."""
    return ",".join(f"{pool[0]}-{pool[-1]}" if len(pool) > 1 else str(pool[0]) for pool in pools)


def level_loads(counts: Evaluations, pools: Sequence[range], costs: Sequence[Costs]) -> np.ndarray:
    """Expected seconds per sample in each pool and level, float64 (pools, K), by the costs on each pool's devices."""
    load = np.zeros((len(pools), len(costs[0].alone)))
    for together, count in counts.items():
        for index, (levels, here) in enumerate(zip(called(together, pools), costs, strict=True)):
            for k, seconds in here.of(levels).items():
                load[index, k - 1] += count * seconds
    return load


def allot(load: np.ndarray, devices: int, trajectories: bool = True) -> list[list[Seat]]:
    """Seats of each pool on `devices` devices, so that every device and every pool has the same load per device.

    McNaughton's wrap-around rule (Management Science 6, 1959): the pools' shares are laid end to end along the
    devices, and cut where a device ends. A first pool that holds the `trajectories` always has a seat; another pool
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
            # Round down to Ray's resolution, so that the shares of a device never add up to more than 1.
            seat = Seat(device, math.floor((stop - at + 1e-9) * 1e4) / 1e4)
            # A sliver at a cut is not worth an actor if the pool has another seat.
            if seat.share >= LEAST_SHARE / 2 or (stop == end and not seats[pool]):
                seats[pool].append(seat)
            at = stop
    return seats


def allot_kinds(load: np.ndarray, kinds: Sequence[int], devices: Sequence[int]) -> list[list[Seat]]:
    """As `allot`, for several kinds: pool i is on devices of kind `kinds[i]`, of which there are `devices[kind]`.

    The devices are numbered kind by kind. If no pool of a kind has load, none but the first pool gets seats there.
    """
    seats: list[list[Seat]] = [[] for _ in load]
    for kind, count in enumerate(devices):
        pools = [i for i, other in enumerate(kinds) if other == kind]
        if load[pools].any() or 0 in pools:
            first = sum(devices[:kind])
            for i, allotted in zip(pools, allot(load[pools], count, 0 in pools), strict=True):
                seats[i] = [Seat(seat.device + first, seat.share) for seat in allotted]
    return seats
