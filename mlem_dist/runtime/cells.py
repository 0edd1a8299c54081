"""Cells: coordinators with devices of their own, which share nothing but the list of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from mlem_dist.dataset.shards import is_whole, marked_shards, shard_path
from mlem_dist.runtime.job import Job
from mlem_dist.runtime.pool import DEATHS, PoolError, cause
from mlem_dist.runtime.progress import PoolProgress, Progress

CELL_DEVICES = 64
"""At most so many devices per coordinator; `forecast` takes fewer where it would be busy more than half of its time."""

TRIES = 4
AHEAD = 6
"""Blocks per device that a coordinator has to begin, so that it never waits for the driver."""

POLL_SECONDS = 0.5
"""How long the driver waits between two rounds over the cells."""


class Cell:
    """One coordinator after another: a dead one is replaced, and makes again what it had not finished.

    Args:
        create: makes a coordinator.
        devices: how many the cell has.
        job, out: the dataset.
    """

    def __init__(self, create: Callable[[], Any], devices: int, job: Job, out: Path) -> None:
        self.devices, self.job, self.out = devices, job, out
        self._in_a_row = 0
        self.finished = False
        self._create = create
        self._given: list[int] = []
        self._past: Progress | None = None
        self._begin()

    def _begin(self) -> None:
        self.coordinator = self._create()
        self.run = self.coordinator.run.remote()
        self.progress: Progress | None = None
        self._closed = False
        self._count = self._blocks = self.queued = 0

    @property
    def ready(self) -> bool:
        """Whether it has its devices and levels; it may wait for those that others use."""
        return self.progress is not None and self.progress.ready is not None

    @property
    def idle(self) -> bool:
        """Whether its coordinator has been given nothing."""
        return not self._count

    @property
    def spent(self) -> bool:
        """Whether its coordinator has sampled all that it was given."""
        return self.idle or (self.progress is not None and self.progress.blocks >= self._blocks)

    @property
    def wants(self) -> bool:
        """Whether its coordinator should be given another shard."""
        return not self._closed and self.queued < AHEAD * self.devices

    def give(self, shard: int) -> None:
        """Hand a shard to the coordinator."""
        self._given.append(shard)
        self._count += 1
        self._blocks += len(self.job.shard_blocks(shard))
        self.queued += len(self.job.shard_blocks(shard))
        self.coordinator.add.remote(shard)

    def close(self) -> None:
        """Let the coordinator end when it has made what it was given."""
        if not self._closed:
            self.coordinator.close.remote(self._count)
            self._closed = True

    def poll(self) -> list[int]:
        """Ask for progress; the shards that must be given again, as the coordinator died with them.

        Raises:
            PoolError: coordinators die faster than they work, or one says so of its actors.
            NonFiniteError: a block ended with NaN or infinite values.
        """
        if self.finished:
            return []
        try:
            ended = bool(ray.wait([self.run], timeout=0)[0])
            if ended:
                ray.get(self.run)
            self.progress = ray.get(self.coordinator.progress.remote())
            self.queued = self.progress.queued
            if self.progress.blocks:
                self._in_a_row = 0
            self.finished = ended
        except RayTaskError as error:
            raise cause(error) from None
        except DEATHS as error:
            return self._replace(error)
        return []

    def _replace(self, error: Exception) -> list[int]:
        self._in_a_row += 1
        if self._in_a_row >= TRIES:
            raise PoolError(f"{TRIES} coordinators in turn died; the last one: {error}") from None
        # A shard is made when its marker is there, which follows the file.
        marked = {shard.path for shard in marked_shards(self.out) if is_whole(self.out, shard)}
        made: list[int] = []
        lost: list[int] = []
        for shard in self._given:
            (made if shard_path(shard, self.job.shards) in marked else lost).append(shard)
        if self.progress:
            self._past = replace(
                self.total(),
                samples=sum(len(self.job.shard_rows(shard)) for shard in made),
                blocks=sum(len(self.job.shard_blocks(shard)) for shard in made),
                queued=0,
                devices=0,
                pools=tuple(replace(pool, actors=0) for pool in self.total().pools),
                writers=tuple(replace(pool, actors=0) for pool in self.total().writers),
            )
        self._given = made
        self._begin()
        return lost

    def total(self) -> Progress:
        """The progress of the coordinator and of those before it."""
        assert self.progress is not None
        if self._past is None:
            return self.progress
        return merged([self.progress, self._past])


def merged(parts: Sequence[Progress]) -> Progress:
    """The progress of several coordinators, the first of which says what is going on."""
    firsts = [part.first_block for part in parts if part.first_block is not None]
    return Progress(
        next((part.state for part in parts if part.state != "sampling"), parts[0].state),
        max(part.seconds for part in parts),
        max((part.ready for part in parts if part.ready is not None), default=None),
        min(firsts, default=None),
        sum(part.samples for part in parts),
        sum(part.blocks for part in parts),
        sum((Counter(part.calls) for part in parts), Counter()),
        sum(part.devices for part in parts),
        _by_name([pool for part in parts for pool in part.pools]),
        sum(part.queued for part in parts),
        _by_name([pool for part in parts for pool in part.writers]),
    )


def _by_name(pools: Sequence[PoolProgress]) -> tuple[PoolProgress, ...]:
    """The totals of pools of each name."""
    return tuple(
        reduce(PoolProgress.__add__, [pool for pool in pools if pool.name == name])
        for name in dict.fromkeys(pool.name for pool in pools)
    )
