"""Policies that coordinator and simulation share: blocks in flight, writers, and moves of actors between pools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mlem_dist.capacity.placement import Devices, Seat

FULL, FREE = 0.8, 0.7
"""A pool as busy as the first has too few seats; one that would be busier than the second without a seat keeps it."""


@dataclass(frozen=True)
class Load:
    """A pool over a window.

    Attributes:
        devices: what its seats are on.
        seats: those with an actor that works.
        busy: device seconds per second.
        queued: whether calls have waited for an actor all the time; True for the pool of the trajectories, which is
            never given more blocks than it can hold.
    """

    devices: Devices
    seats: tuple[Seat, ...]
    busy: float
    queued: bool

    def share(self, without: Seat | None = None) -> float:
        """How busy its seats are, or would be without one of them."""
        return self.busy / max(sum(seat.share for seat in self.seats if seat != without), 1e-9)


@dataclass(frozen=True)
class Move:
    """A seat of pool `giver` for pool `taker`."""

    giver: int
    taker: int
    seat: Seat


def choose_move(loads: Sequence[Load], refused: Collection[tuple[int, int]] = ()) -> Move | None:
    """The busiest full pool takes the seat that is missed least; None if there is no such pool or seat.

    `refused` are pools and devices on which they cannot start an actor.

    Seats go to pools on devices of the same kind, and not to one that has an actor on that device already: the actors
    of a device share it as they need it.
    """
    full = [i for i, load in enumerate(loads) if load.queued and load.share() >= FULL]
    for taker in sorted(full, key=lambda i: -loads[i].share()):
        sat_on = {seat.device for seat in loads[taker].seats}
        free = [
            (load.share(without=seat), Move(giver, taker, seat))
            for giver, load in enumerate(loads)
            for seat in load.seats
            if giver != taker and load.devices == loads[taker].devices and len(load.seats) > 1
            if seat.device not in sat_on and (taker, seat.device) not in refused
        ]
        if free:
            left, move = min(free, key=lambda option: option[0])
            if left <= FREE:
                return move
    return None


# Two calls per actor hide the way between them; each trajectory actor has at least two blocks for the same reason.
SLOTS = 2

BLOCKS_PER_DEVICE = {"cpu": 3, "cuda": 8}
"""In flight where pools share the work, by device type: on a GPU the way to another pool is long beside the work."""

FLIGHT_BYTES = 2**28
"""Memory limit for the states of a device's blocks in flight, with the values of other pools; two blocks always fly."""

WRITER_SHARE = 0.7


def trajectory_depth(devices: Sequence[str], actors: int, pools: int, block_bytes: int) -> int:
    """Blocks in flight per trajectory actor: enough that no device waits for one; more would only finish later.

    Args:
        devices: the type of each.
        actors: that hold trajectories.
        pools: that share the work.
        block_bytes: of a block's state.
    """
    if pools == 1:
        return SLOTS
    most = max(SLOTS, FLIGHT_BYTES // block_bytes)
    return max(SLOTS, -(-sum(min(BLOCKS_PER_DEVICE[kind], most) for kind in devices) // actors))


def writer_count(images_per_second: float, seconds: float) -> int:
    """Writers for so many images per second, each written in `seconds`; they are busy for 70 % of the time at most."""
    return 1 + int(images_per_second * seconds / WRITER_SHARE)


AHEAD = 6
"""Blocks per device that a coordinator has to begin, so that it never waits for the driver."""

POLL_SECONDS = 0.5
"""How long the driver waits between two rounds over the cells."""
