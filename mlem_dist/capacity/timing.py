"""Timing of levels on a device, evaluated as by a worker there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mlem_dist.engine.job import Job
from mlem_dist.engine.worker import Levels
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import seconds_per_sample


def time_levels(job: Job, numbers: Sequence[int]) -> list[float]:
    """Seconds per sample of levels by number, in blocks of the job, evaluated as by a worker in this process.

    Levels are loaded one after the other, as memory may not hold all. A level that does not fit has NaN.
    """
    ladder = Ladder.read(job.ladder)
    batch = ladder, job.device, job.block_size
    seconds = []
    for k in numbers:
        try:
            # No variable holds the level while the next one is loaded.
            seconds.append(seconds_per_sample(Levels(ladder, job.device, job.precision)[k], *batch, warm=1, repeats=1))
        except torch.OutOfMemoryError:
            seconds.append(math.nan)
    return seconds
