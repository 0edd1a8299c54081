"""Workers as Ray actors. A process that creates and calls them need not import torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlem_dist.engine.job import Job
from mlem_dist.engine.program import Ask, SegmentEnd
from mlem_dist.engine.progress import Work
from mlem_dist.models.imports import hide_unused

if TYPE_CHECKING:
    from mlem_dist.engine.worker import LevelWorker, TrajectoryWorker


class LevelActor:
    """A `LevelWorker` in a process of its own."""

    worker: LevelWorker

    def __init__(self, job: Job, pools: Sequence[range], pool: int) -> None:
        self.arguments = job, pools, pool

    def _worker(self) -> LevelWorker:
        from mlem_dist.engine.worker import LevelWorker

        return LevelWorker(*self.arguments)

    def prepare(self) -> None:
        """Import torch, then do as `LevelWorker.prepare`."""
        hide_unused()
        # Not in the constructor: Ray takes an error there for the actor's death.
        self.worker = self._worker()
        self.worker.prepare()

    def evaluate(self, asks: Sequence[tuple[int, Ask]], *states: np.ndarray) -> tuple[Work | np.ndarray, ...]:
        """As `LevelWorker.evaluate`."""
        return self.worker.evaluate(asks, *states)


class TrajectoryActor(LevelActor):
    """A `TrajectoryWorker` in a process of its own."""

    worker: TrajectoryWorker

    def _worker(self) -> TrajectoryWorker:
        from mlem_dist.engine.worker import TrajectoryWorker

        return TrajectoryWorker(*self.arguments)

    def start(self, block: int) -> tuple[SegmentEnd, np.ndarray]:
        """As `TrajectoryWorker.start`."""
        return self.worker.start(block)

    def resume(self, block: int, *answers: np.ndarray) -> tuple[SegmentEnd, np.ndarray]:
        """As `TrajectoryWorker.resume`."""
        return self.worker.resume(block, *answers)

    def drop(self, block: int) -> None:
        """As `TrajectoryWorker.drop`."""
        self.worker.drop(block)
