"""Workers as Ray actors. A process that creates and calls them need not import torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlem_dist.engine.job import Job
from mlem_dist.engine.program import Ask, SegmentEnd
from mlem_dist.engine.progress import Work
from mlem_dist.engine.scores import Batch, Scorer
from mlem_dist.models.imports import hide_unused

if TYPE_CHECKING:
    from mlem_dist.engine.worker import Arrays, LevelWorker, StageWorker, TrajectoryWorker


class LevelActor:
    """A `LevelWorker` in a process of its own."""

    worker: LevelWorker

    def __init__(self, job: Job, pools: Sequence[range], pool: int, stages: Sequence[str] = ()) -> None:
        self.job = job
        self.arguments = job, pools, pool, stages

    def _worker(self) -> LevelWorker:
        from mlem_dist.engine.worker import LevelWorker

        return LevelWorker(*self.arguments)

    def _encodes(self) -> bool:
        """Whether this process encodes prompts, for which diffusers needs more packages."""
        return False

    def prepare(self) -> None:
        """Import torch, then do as `LevelWorker.prepare`."""
        if not self._encodes():
            hide_unused()
        # Not in the constructor: Ray takes an error there for the actor's death.
        self.worker = self._worker()
        self.worker.prepare()

    def evaluate(self, asks: Sequence[tuple[int, Ask]], *given: Any) -> tuple[Work | np.ndarray, ...]:
        """As `LevelWorker.evaluate`."""
        return self.worker.evaluate(asks, *given)


class TrajectoryActor(LevelActor):
    """A `TrajectoryWorker` in a process of its own."""

    worker: TrajectoryWorker

    def _worker(self) -> TrajectoryWorker:
        from mlem_dist.engine.worker import TrajectoryWorker

        return TrajectoryWorker(*self.arguments)

    def _encodes(self) -> bool:
        *_, stages = self.arguments
        return bool(self.job.prompts) and "encode" not in stages

    def start(self, block: int, condition: Arrays | None = None) -> tuple[SegmentEnd, np.ndarray]:
        """As `TrajectoryWorker.start`."""
        return self.worker.start(block, condition)

    def resume(self, block: int, *answers: np.ndarray) -> tuple[SegmentEnd, np.ndarray]:
        """As `TrajectoryWorker.resume`."""
        return self.worker.resume(block, *answers)

    def drop(self, block: int) -> None:
        """As `TrajectoryWorker.drop`."""
        self.worker.drop(block)


class StageActor:
    """A `StageWorker` in a process of its own."""

    worker: StageWorker

    def __init__(self, job: Job, stage: str) -> None:
        self.job, self.stage = job, stage

    def prepare(self) -> None:
        """Import torch, then do as `StageWorker.prepare`."""
        if self.stage != "encode":
            hide_unused()
        from mlem_dist.engine.worker import StageWorker

        self.worker = StageWorker(self.job, self.stage)
        self.worker.prepare()

    def encode(self, block: int) -> tuple[Work, Arrays]:
        """As `StageWorker.encode`."""
        return self.worker.encode(block)

    def decode(self, block: int, latents: np.ndarray) -> tuple[Work, np.ndarray]:
        """As `StageWorker.decode`."""
        return self.worker.decode(block, latents)


class ScoreActor:
    """A `Scorer` in a process of its own."""

    scorer: Scorer

    def __init__(self, job: Job) -> None:
        self.job = job

    def prepare(self) -> None:
        """Make the score classes."""
        # Not in the constructor: Ray takes an error there for the actor's death.
        self.scorer = Scorer(self.job)

    def score(self, block: int, images: np.ndarray) -> tuple[Work, Batch]:
        """As `Scorer.score`."""
        return self.scorer.score(block, images)
