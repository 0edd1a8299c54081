"""What a run is set against: the levels' own time."""

from collections.abc import Sequence

import numpy as np

from mlem_dist.capacity.placement import Costs, level_loads
from mlem_dist.engine.job import Job
from mlem_dist.engine.program import evaluations


def own_seconds(job: Job, pools: Sequence[range], costs: Costs, calls: np.ndarray) -> float:
    """Device seconds per sample, for calls (K,) per sample; level 1, which others take in, counts once per state."""
    each, sharing = (
        level_loads(evaluations(job.workload), pools, [one] * len(pools))
        for one in (Costs(costs.alone, costs.alone), costs)
    )
    return float(calls @ costs.alone - (each - sharing).sum())
