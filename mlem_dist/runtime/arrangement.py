"""Arrangement of a run: a placement, given or chosen by forecast, with the devices and costs of its pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlem_dist.capacity.placement import CELL_DEVICES, Devices, Placement, level_loads
from mlem_dist.capacity.planner import Forecast, Layout, cluster_kind, costs_of, forecast, layouts, with_stages
from mlem_dist.capacity.timing import time_levels
from mlem_dist.engine.job import Job
from mlem_dist.engine.program import evaluations, levels_of
from mlem_dist.engine.scores import time_scores
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import LEAST_SECONDS, Ladder
from mlem_dist.models.devices import device_memory, gpu_memory
from mlem_dist.runtime.cluster import count_devices, find_devices, live_nodes
from mlem_dist.runtime.pool import cause

LONG_SECONDS, TIMING_SHARE = 60, 0.05
"""Shortest run for which levels are timed, in seconds by the ladder's costs, and largest share of it for the timing."""

SCORE_SECONDS = 0.1
"""Time of scores per image if it is not known."""

DEVICE_SECONDS = 60
"""Longest wait for a device that times levels or reports its memory, in seconds; other runs may use all devices."""


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The pools of a run and their devices.

    Attributes:
        layout: the pools and their kinds of devices.
        cell_devices: largest number of devices in a cell.
        forecasts: forecasts of the compared placements, the chosen one first; empty if the placement was given.
        timed: whether levels were timed for this run; otherwise their costs are the ladder's.
        score_types: types of the columns of scores, by name; empty if they are not known.
    """

    layout: Layout
    cell_devices: int = CELL_DEVICES
    forecasts: list[Forecast] = field(default_factory=list)
    timed: bool = False
    score_types: dict[str, pa.DataType] = field(default_factory=dict)


def arrange(job: Job, ladder: Ladder, placement: Placement | None, devices: int | None, remote: bool) -> Arrangement:
    """The arrangement of a job on the connected cluster; without a placement, that of the best forecast.

    Args:
        devices: number of devices to use if the placement does not name them; None for all.
        remote: whether Ray runs elsewhere, rather than started by this process.

    Raises:
        UsageError: if devices are missing, or no placement fits into their memory.
    """
    if placement and any(placement.kinds):
        pool_devices = find_devices(placement.kinds, job.device)
    else:
        pools = 1 if placement is None else len(placement.pools)
        pool_devices = [Devices(job.device, count_devices(job.device, devices))] * pools
    cost = {kind: ladder.cost(kind.type) for kind in pool_devices}
    score, types = measured_score(job, ladder, pool_devices[0])
    timed = False
    # One pool for all levels needs no comparison.
    if (placement is None or len(placement.pools) > 1) and is_long(job, ladder, pool_devices):
        measured = _measured_costs(job, ladder, placement, pool_devices, remote)
        cost, timed = cost | measured, bool(measured)
    if placement:
        # The placement is given: the forecast only says how many devices a coordinator can serve.
        kinds = [cluster_kind(devices, ladder, cost[devices], score=score) for devices in dict.fromkeys(pool_devices)]
        by_devices = {kind.devices: kind for kind in kinds}
        layout = with_stages(placement.pools, tuple(by_devices[devices] for devices in pool_devices))
        return Arrangement(layout, forecast(job.workload, layout).cell_devices, timed=timed, score_types=types)
    kind = cluster_kind(pool_devices[0], ladder, cost[pool_devices[0]], least_memory(job.device, remote), score)
    forecasts = [forecast(job.workload, layout) for layout in layouts(job.workload, ladder.weight_bytes, kind)]
    forecasts.sort(key=lambda result: result.seconds)
    return Arrangement(forecasts[0].layout, forecasts[0].cell_devices, forecasts, timed, types)


def _measured_costs(
    job: Job, ladder: Ladder, placement: Placement | None, pool_devices: Sequence[Devices], remote: bool
) -> dict[Devices, np.ndarray]:
    """`measured_cost` of each kind of device for the levels that it runs; only the kinds that answered in time."""
    pools = placement.pools if placement else [range(1, len(ladder.levels) + 1)]
    pool_levels = levels_of(evaluations(job.workload), pools)
    costs = {}
    for kind in dict.fromkeys(pool_devices):
        numbers = {
            k for levels, devices in zip(pool_levels, pool_devices, strict=True) if devices == kind for k in levels
        }
        costs[kind] = measured_cost(job, ladder, kind, sorted(numbers), remote)
    return {kind: cost for kind, cost in costs.items() if cost is not None}


def is_long(job: Job, ladder: Ladder, devices: Sequence[Devices]) -> bool:
    """Whether a job is long enough to time its levels first."""
    every, cost = [range(1, len(ladder.levels) + 1)], ladder.cost(job.device)
    counts = evaluations(job.workload)
    load = float(level_loads(counts, every, [costs_of(ladder, cost, job.device)]).sum())
    run = job.num * load / sum(kind.count for kind in dict.fromkeys(devices))
    timing = 2 * job.block_size * sum(cost[k - 1] for k in levels_of(counts, every)[0])
    return run > LONG_SECONDS and timing < TIMING_SHARE * run


def measured_cost(
    job: Job, ladder: Ladder, devices: Devices, numbers: Sequence[int], remote: bool
) -> np.ndarray | None:
    """float64 (K,): seconds per sample of each level in the job's blocks and precision, timed on one of the devices.

    Levels on CPU cores that are not `remote` are timed by this process, which is running already. Levels other than
    `numbers`, and levels that do not fit into memory, have the ladder's costs. The result is None if no device has
    finished within a minute, as when other runs use all devices, or if the timing fails there.

    Raises:
        UsageError: if the ladder cannot be loaded there.
    """
    cost, device_job = ladder.cost(devices.type), replace(job, device=devices.type)
    if devices.type == "cpu" and not remote:
        return _replaced(cost, numbers, time_levels(device_job, numbers))
    # The process ends after this call: otherwise it would keep its GPU memory.
    task: Any = ray.remote(max_calls=1)(time_levels)
    resources = {"num_gpus": 1, "num_cpus": 0} if devices.type == "cuda" else {"num_cpus": 1}
    timed = task.options(**resources, label_selector=dict(devices.labels)).remote(device_job, numbers)
    if not ray.wait([timed], timeout=DEVICE_SECONDS)[0]:
        ray.cancel(timed, force=True)
        return None
    try:
        return _replaced(cost, numbers, ray.get(timed))
    except RayError as error:
        if isinstance(cause(error), UsageError):
            raise cause(error) from None
        # The run itself will report the error.
        return None


def measured_score(job: Job, ladder: Ladder, devices: Devices) -> tuple[float, dict[str, pa.DataType]]:
    """Seconds per image and types of columns of the job's score classes, timed in a task on one of the devices.

    The time is 0 if there are no classes, and `SCORE_SECONDS` if no device is free within a minute.

    Raises:
        UsageError: if a class cannot be imported there.
        ScoreError: if a class raises, or returns what cannot be written.
    """
    if not job.scores:
        return 0.0, {}
    task: Any = ray.remote(max_calls=1)(time_scores)
    resources = {"num_gpus": 1, "num_cpus": 0} if devices.type == "cuda" else {"num_cpus": 1}
    timed = task.options(**resources, label_selector=dict(devices.labels)).remote(job, ladder.image_shape)
    if not ray.wait([timed], timeout=DEVICE_SECONDS)[0]:
        ray.cancel(timed, force=True)
        return SCORE_SECONDS, {}
    try:
        seconds, types = ray.get(timed)
        return max(seconds, LEAST_SECONDS), types
    except RayError as error:
        raise cause(error) from None


def _replaced(cost: np.ndarray, numbers: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    measured = dict(zip(numbers, seconds, strict=True))
    return np.array(
        [measured[k] if np.isfinite(measured.get(k, np.nan)) else stored for k, stored in enumerate(cost, 1)]
    )


def least_memory(device: str, remote: bool) -> float:
    """Memory of the smallest device in bytes: the smallest GPU, or the smallest memory per CPU core of a node.

    It is infinite if there are none. If Ray is not `remote`, this process reads the memory of the machine's GPUs.
    Otherwise a process on each node, which takes seconds to start, reads that of one GPU, once per set of nodes.

    Raises:
        UsageError: if no GPU is free to be asked, or a node cannot report the memory of its GPUs.
    """
    if device == "cuda" and not remote:
        return device_memory(device)
    if device == "cuda":
        nodes = frozenset(node["NodeID"] for node in live_nodes() if node["Resources"].get("GPU", 0))
        return _least_gpu(nodes) if nodes else math.inf
    resources = [node["Resources"] for node in live_nodes()]
    shares = (float(node["memory"] / node["CPU"]) for node in resources if node.get("CPU", 0) >= 1)
    return min(shares, default=math.inf)


@lru_cache(maxsize=1)
def _least_gpu(nodes: frozenset[str]) -> float:
    """Bytes of memory of the smallest GPU of nodes, of each of which one GPU is asked; raises as `least_memory`."""
    task: Any = ray.remote(num_cpus=0, num_gpus=0.01, max_calls=1)(gpu_memory)
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    asked = [task.options(scheduling_strategy=strategy).remote() for strategy in strategies]
    answered, late = ray.wait(asked, num_returns=len(asked), timeout=DEVICE_SECONDS)
    for unanswered in late:
        ray.cancel(unanswered, force=True)
    if not answered:
        raise UsageError(
            "`placement` auto: others use all GPUs, whose memory it asks for; wait for them, or name the placement"
        )
    try:
        return float(min(ray.get(answered)))
    except RayError as error:
        raise UsageError(
            f"`placement` auto: a node cannot say how much memory its GPUs have ({cause(error)}); install torch "
            "with CUDA on every node, or name the placement"
        ) from None
