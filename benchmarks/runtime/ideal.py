"""What a run is set against: the levels' own time."""

from collections.abc import Sequence

import numpy as np

from mlem_dist.runtime.job import Job
from mlem_dist.runtime.placement import Costs, called, evaluations


def own_seconds(job: Job, pools: Sequence[range], costs: Costs, calls: np.ndarray) -> float:
    """Device seconds per sample, for calls (K,) per sample; level 1, which others take in, counts once per state."""
    shared = 0.0
    for together, count in evaluations(job).items():
        for levels in called(together, pools):
            shared += count * sum(costs.alone[k - 1] - seconds for k, seconds in costs.of(levels).items())
    return float(calls @ costs.alone) - shared
