"""Policies of the coordinator and the simulation: blocks in flight, writers, and moves of actors between pools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mlem_dist.capacity.placement import Devices, Seat

FULL_SHARE, SPARE_SHARE = 0.8, 0.7
"""Busy share from which a pool has too few seats, and largest busy share of a pool after giving up a seat."""


@dataclass(frozen=True)
class Load:
    """The load of a pool over a window of time.

    Attributes:
        devices: the pool's devices.
        seats: the seats with an actor that can work.
        busy: device seconds per second.
        queued: whether calls have waited for an actor all the time; True for the pool of the trajectories, which is
            never given more blocks than it can hold.
    """

    devices: Devices
    seats: tuple[Seat, ...]
    busy: float
    queued: bool

    def share(self, without: Seat | None = None) -> float:
        """Busy share of the pool's seats, or of its seats without one of them."""
        return self.busy / max(sum(seat.share for seat in self.seats if seat != without), 1e-9)


@dataclass(frozen=True)
class Move:
    """The move of a seat from pool `giver` to pool `taker`."""

    giver: int
    taker: int
    seat: Seat


def choose_move(loads: Sequence[Load], refused: Collection[tuple[int, int]] = ()) -> Move | None:
    """The move that gives the busiest full pool the seat that is missed least; None if no pool can take or give one.

    `refused` holds pairs of a pool and a device on which the pool cannot start an actor.

    A seat goes to a pool on devices of the same kind. It does not go to a pool that has an actor on that device
    already, as the actors of a device share it as they need it.
    """
    full = [i for i, load in enumerate(loads) if load.queued and load.share() >= FULL_SHARE]
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
            if left <= SPARE_SHARE:
                return move
    return None


# Two calls per actor hide the time between calls; each trajectory actor has at least two blocks for the same reason.
SLOTS = 2

BLOCKS_PER_DEVICE = {"cpu": 3, "cuda": 8}
"""Blocks in flight per device if pools share the work, by device type; on a GPU, trips are long beside the work."""

FLIGHT_BYTES = 2**28
"""Memory limit for the states of one device's in-flight blocks, in bytes; two blocks are always allowed."""

WRITER_SHARE = 0.7


def trajectory_depth(devices: Sequence[str], actors: int, pools: int, block_bytes: int) -> int:
    """Blocks in flight per trajectory actor: enough that no device waits for a block; more would only finish later.

    Args:
        devices: the type of each device.
        actors: number of actors that hold trajectories.
        pools: number of pools that share the work.
        block_bytes: size of a block's state, in bytes.
    """
    if pools == 1:
        return SLOTS
    most = max(SLOTS, FLIGHT_BYTES // block_bytes)
    return max(SLOTS, -(-sum(min(BLOCKS_PER_DEVICE[kind], most) for kind in devices) // actors))


def writer_count(images_per_second: float, seconds: float) -> int:
    """Number of writers for a rate of images, each written in `seconds`; a writer is busy at most 70 % of its time."""
    return 1 + int(images_per_second * seconds / WRITER_SHARE)


QUEUED_BLOCKS_PER_DEVICE = 6
"""Blocks per device that wait at a coordinator, so that it never waits for the driver."""

POLL_SECONDS = 0.5
"""Time that the driver waits between two rounds over the cells, in seconds."""
