"""Cells: coordinators with devices of their own, which share only the list of shards."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from typing import Any

import ray
from ray.exceptions import RayTaskError

from mlem_dist.capacity.policies import QUEUED_BLOCKS_PER_DEVICE
from mlem_dist.dataset.manifest import read_manifest
from mlem_dist.dataset.shards import marked_shards, shard_index, whole_shards
from mlem_dist.engine.job import Job
from mlem_dist.engine.progress import WAITS, PoolProgress, Progress
from mlem_dist.runtime.cluster import check_alive
from mlem_dist.runtime.pool import DEATHS, PoolError, cause
from mlem_dist.store import Location

logger = logging.getLogger(__name__)

TRIES = 4

STUCK_SECONDS = 60
"""Longest time that a cell waits for an actor before cells with nothing else to do make its shards, in seconds."""


ANSWER_SECONDS = 0.1
"""Longest time that a round waits for the answer of one cell, in seconds; a later round takes a later answer."""


class Cell:
    """A cell's coordinators, one at a time: a dead one is replaced, and its unfinished shards are made again.

    Args:
        create: a function that creates a coordinator.
        devices: number of the cell's devices.
        job, out: the dataset.
        began: the time of the monotonic clock, in seconds, from which the times of the progress count.
    """

    def __init__(self, create: Callable[[], Any], devices: int, job: Job, out: Location, began: float) -> None:
        self.devices, self.job, self.out = devices, job, out
        self._deaths_in_a_row = 0
        self.finished = False
        self._create = create
        # Shards that are still to be made, and the numbers of samples and blocks in the shards that have been made.
        self._open: dict[int, None] = {}
        self._samples = self._blocks = 0
        # Rows of shards that have been made since they were last taken.
        self._written: dict[int, int] = {}
        self._past: Progress | None = None
        self._began = began
        self._begin()

    def _begin(self) -> None:
        self.coordinator = self._create()
        self.run = self.coordinator.run.remote()
        self.progress: Progress | None = None
        # The unanswered request for progress and whether the coordinator had ended before it; and the number of blocks
        # given since that request.
        self._request: tuple[Any, bool] | None = None
        self._given_since_request = 0
        self._clock_offset = math.inf
        self._waits_since: float | None = None
        self._closed = False
        self._count = self._known = self.queued = 0

    @property
    def ready(self) -> bool:
        """Whether the coordinator has its devices and levels; it may wait for devices that others use."""
        return self.progress is not None and self.progress.ready is not None

    @property
    def idle(self) -> bool:
        """Whether the coordinator has been given no shard."""
        return not self._count

    @property
    def spent(self) -> bool:
        """Whether the coordinator has written all shards that it was given."""
        return not self._open

    @property
    def silent(self) -> bool:
        """Whether the coordinator has not yet answered a request, as while it starts."""
        return self._request is not None

    @property
    def stuck(self) -> bool:
        """Whether the cell has waited too long for an actor, as when the node with all devices of a pool is lost."""
        return self._waits_since is not None and time.monotonic() - self._waits_since > STUCK_SECONDS

    def give_up(self) -> None:
        """End the coordinator, so that the next `poll` returns its shards; its successor waits for the devices."""
        ray.kill(self.coordinator)

    @property
    def wants(self) -> bool:
        """Whether the coordinator should be given another shard."""
        return not self._closed and self.queued < QUEUED_BLOCKS_PER_DEVICE * self.devices

    def give(self, shard: int) -> None:
        """Hand a shard to the coordinator."""
        self._open[shard] = None
        self._count += 1
        self.queued += len(self.job.shard_blocks(shard))
        self._given_since_request += len(self.job.shard_blocks(shard))
        self.coordinator.add.remote(shard)

    def close(self) -> None:
        """Let the coordinator end when it has made the shards that it was given."""
        if not self._closed:
            self.coordinator.close.remote(self._count)
            self._closed = True

    def poll(self) -> list[int]:
        """Ask for progress; returns the shards of a coordinator that has died, which must be handed out again.

        Raises:
            PoolError: if coordinators die faster than they work, or if the actors of a pool do.
            UsageError, NonFiniteError: as `Coordinator.run`.
        """
        if self.finished:
            return []
        try:
            if self._request is None:
                ended = bool(ray.wait([self.run], timeout=0)[0])
                if ended:
                    ray.get(self.run)
                self._request, self._given_since_request = (self.coordinator.progress.remote(self._known), ended), 0
            answer, ended = self._request
            if not ray.wait([answer], timeout=ANSWER_SECONDS)[0]:
                return []
            self._request = None
            progress: Progress = ray.get(answer)
            # The coordinator's clock starts after its imports. The quickest answer estimates that delay best.
            self._clock_offset = min(self._clock_offset, time.monotonic() - self._began - progress.seconds)
            self.progress = progress.later(self._clock_offset)
            self._known += len(progress.written)
            self._made(progress.written)
            self.queued = self.progress.queued + self._given_since_request
            if not self.progress.state.startswith(WAITS):
                self._waits_since = None
            elif self._waits_since is None:
                self._waits_since = time.monotonic()
            if self.progress.blocks:
                self._deaths_in_a_row = 0
            self.finished = ended
        except RayTaskError as error:
            raise cause(error) from None
        except DEATHS as error:
            return self._replace(error)
        return []

    def _replace(self, error: Exception) -> list[int]:
        logger.warning("a coordinator is lost (%s), starting another", type(error).__name__)
        # A coordinator that is only out of reach would go on writing shards that are given to others.
        ray.kill(self.coordinator)
        # The death of a coordinator without shards does not count: it may die with any node that it happens to run on.
        self._deaths_in_a_row += not (self.idle and self.progress)
        if self._deaths_in_a_row >= TRIES:
            raise PoolError(f"{TRIES} coordinators in turn died; the last one: {error}") from None
        # A shard is made when its marker exists, which is written after the file.
        paths = map(self.job.shard_path, self._open)
        marked = whole_shards(self.out, marked_shards(self.out, read_manifest(self.out).fingerprint, paths))
        rows = {shard_index(path): shard.rows for path, shard in marked.items()}
        self._made({shard: rows[shard] for shard in self._open if shard in rows})
        lost = [*self._open]
        if total := self.total():
            self._past = replace(
                total,
                devices=0,
                state="sampling",
                samples=self._samples,
                blocks=self._blocks,
                # The calls of the lost blocks are unknown, so all calls are scaled by the share of the kept blocks.
                calls={k: round(calls * self._blocks / max(1, total.blocks)) for k, calls in total.calls.items()},
                queued=0,
                pools=tuple(replace(pool, actors=0) for pool in total.pools),
                writers=tuple(replace(pool, actors=0) for pool in total.writers),
            )
        self._open.clear()
        self._begin()
        return lost

    def _made(self, rows: Mapping[int, int]) -> None:
        self._written.update(rows)
        for shard in rows:
            del self._open[shard]
            self._samples += len(self.job.shard_rows(shard))
            self._blocks += len(self.job.shard_blocks(shard))

    def take_written(self) -> dict[int, int]:
        """The numbers of rows of shards that have been made since the last call."""
        written, self._written = self._written, {}
        return written

    def total(self) -> Progress | None:
        """The progress of the coordinator and of those before it; None before the first report."""
        if self.progress is None:
            # The successor has the cell's devices, though it has not reported them yet.
            return replace(self._past, devices=self.devices) if self._past else None
        return merged([self.progress, self._past]) if self._past else self.progress


class Cells:
    """The cells of a run, and the shards that no cell has been given yet."""

    def __init__(self, cells: Sequence[Cell], shards: Sequence[int]) -> None:
        self.cells, self.todo = cells, deque(shards)

    @property
    def done(self) -> bool:
        """Whether all shards are made; a cell without shards may still wait for devices that others use."""
        return not self.todo and all(cell.finished or cell.idle for cell in self.cells)

    def step(self) -> None:
        """Do one round: ask each cell for its progress, and hand out shards.

        Raises:
            PoolError, UsageError, NonFiniteError: as `Cell.poll`.
            RuntimeError: if Ray has died on this machine, so that no coordinator can start here.
        """
        for cell in self.cells:
            self.todo.extendleft(reversed(cell.poll()))
        if any(cell.silent for cell in self.cells):
            check_alive()
        self._hand_out()
        if not self.todo:
            self._close()
            self._take_back()

    def _hand_out(self) -> None:
        alone = len(self.cells) == 1
        while self.todo and (hungry := [cell for cell in self.cells if cell.wants and (cell.ready or alone)]):
            min(hungry, key=lambda cell: cell.queued / cell.devices).give(self.todo.popleft())

    def _close(self) -> None:
        # As long as one cell may lose its devices, another must stay open to take over its shards.
        if len(self.cells) == 1 or all(cell.spent for cell in self.cells):
            for cell in self.cells:
                cell.close()

    def _take_back(self) -> None:
        # Cells with nothing else to do take over the shards of a cell that has lost the devices of a pool.
        if any(cell.spent and not cell.stuck for cell in self.cells):
            for cell in [cell for cell in self.cells if cell.stuck]:
                cell.give_up()

    def progress(self) -> Progress | None:
        """The progress of all cells that have reported; None before the first report."""
        totals = [total for cell in self.cells if (total := cell.total())]
        if not totals:
            return None
        written = {shard: rows for cell in self.cells for shard, rows in cell.take_written().items()}
        return replace(merged(totals), written=written)

    def end_writes(self) -> None:
        """Let coordinators end the shards that are being written, so that none appears later."""
        for ending in [cell.coordinator.end_writes.remote() for cell in self.cells if not cell.finished]:
            # A dead coordinator has taken its writers with it.
            with suppress(*DEATHS):
                ray.get(ending)

    def wait(self, seconds: float) -> None:
        """Wait until a coordinator ends, at most for the given time."""
        ray.wait([cell.run for cell in self.cells if not cell.finished] or [self.cells[0].run], timeout=seconds)


def merged(parts: Sequence[Progress]) -> Progress:
    """The progress of several coordinators together; its state is the first one other than "sampling", if any."""
    return Progress(
        state=next((part.state for part in parts if part.state != "sampling"), parts[0].state),
        seconds=max(part.seconds for part in parts),
        ready=min((part.ready for part in parts if part.ready is not None), default=None),
        first_block=min((part.first_block for part in parts if part.first_block is not None), default=None),
        samples=sum(part.samples for part in parts),
        blocks=sum(part.blocks for part in parts),
        calls=sum((Counter(part.calls) for part in parts), Counter()),
        devices=sum(part.devices for part in parts),
        pools=_by_name([pool for part in parts for pool in part.pools]),
        queued=sum(part.queued for part in parts),
        writers=_by_name([pool for part in parts for pool in part.writers]),
    )


def _by_name(pools: Sequence[PoolProgress]) -> tuple[PoolProgress, ...]:
    """The totals of the pools of each name."""
    return tuple(
        reduce(PoolProgress.__add__, [pool for pool in pools if pool.name == name])
        for name in dict.fromkeys(pool.name for pool in pools)
    )
