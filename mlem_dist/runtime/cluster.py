"""The Ray engine's driver: connect or start Ray, run a coordinator, relay its progress."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime.cells import CELL_DEVICES, POLL_SECONDS, Cell, merged
from mlem_dist.runtime.coordinator import Coordinator, writer_count
from mlem_dist.runtime.job import Job
from mlem_dist.runtime.placement import Devices, Placement, allot_kinds, evaluations, pool_loads
from mlem_dist.runtime.planner import OVERHEADS, Forecast, Kind, forecast, layouts, seat_loads
from mlem_dist.runtime.progress import Progress
from mlem_dist.runtime.worker import time_levels

ANSWER_SECONDS = 10
LONG_SECONDS = 60
"""Of a run, by the ladder's costs, from which on the few seconds that it takes to time the levels are worth it."""

DEVICE_SECONDS = 60
"""How long to wait for a device to time levels on, or for its memory; others may use them all."""

WRITTEN_PIXELS = 32 * 32
"""Of the images by which the writing time was measured (benchmarks/runtime/writer.py)."""

RESOURCES = {"cpu": "CPU", "cuda": "GPU"}
ACCELERATOR = "ray.io/accelerator-type"


def is_remote(address: str | None) -> bool:
    """Whether Ray is somewhere already, rather than to be started here."""
    return _resolved(address) != "local"


def _resolved(address: str | None) -> str:
    """Where Ray is. Left to itself, Ray would also join what `ray start` has begun on this machine."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


def connect(address: str | None) -> None:
    """Connect to the Ray at `address`, to the one that RAY_ADDRESS names, as in a Ray job, or start one here.

    Raises:
        UsageError: nothing answers at the address within some seconds.
    """
    address = _resolved(address)
    if address != "local":
        _check_answer(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RayError) as error:
        raise UsageError(f"no Ray answers at {address}: {' '.join(str(error).split())}") from None
    # ray.init has put its own in place.
    signal.signal(signal.SIGTERM, handler)


def disconnect() -> None:
    """Leave Ray, and end it where it was started here."""
    ray.shutdown()


def _check_answer(address: str) -> None:
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(
            f"--address or RAY_ADDRESS {address!r}: expected HOST:PORT of a Ray head, auto or local; from outside a "
            "cluster use `ray job submit`"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS / 2).close()
        # Something listens, but ray.init would wait for minutes if it is not a Ray head.
        check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        healthy = subprocess.run(check, capture_output=True, timeout=ANSWER_SECONDS, check=False).returncode == 0
    except (OSError, OverflowError, subprocess.TimeoutExpired):
        healthy = False
    if not healthy:
        raise UsageError(
            f"no Ray head answers at --address {address}; start one with `ray start --head`, "
            "export RAY_AUTH_MODE=token if it uses tokens, or leave the option out"
        )


def device_type(device: str) -> str:
    """ "cpu" or "cuda" for "auto" on the connected cluster."""
    if device != "auto":
        return device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def count_devices(device: str, wanted: int | None) -> int:
    """How many CPU cores or GPUs of the connected cluster to use.

    Raises:
        UsageError: there are none, or fewer than wanted.
    """
    resource = RESOURCES[device]
    found = _count(resource, {})
    if found < (wanted or 1):
        raise UsageError(
            f"{wanted or 1} {resource}s are needed and Ray has {found}; "
            + ("use --device cpu or a cluster with GPUs" if device == "cuda" and not found else "lower --devices")
        )
    return wanted or found


def find_devices(kinds: Sequence[str], device: str) -> list[Devices]:
    """The connected cluster's devices of each kind, all that there are.

    A kind is "cpu", any CPU core; KEY=VALUE, the devices of type `device` on nodes with that label; or the name of an
    accelerator, such as "L4", for Ray's own label of it.

    Raises:
        UsageError: there are none of a kind, or two kinds are on one node.
    """
    found = []
    for kind in kinds:
        key, equals, value = kind.partition("=")
        labels = () if kind == "cpu" else ((key, value) if equals else (ACCELERATOR, kind),)
        type_ = "cpu" if kind == "cpu" else device
        count = _count(RESOURCES[type_], dict(labels))
        if not count:
            known = sorted({f"{key}={value}" for node in _nodes() for key, value in node["Labels"].items()})
            raise UsageError(
                f"--placement: no node has a {RESOURCES[type_]} and is of kind {kind!r}; expected cpu, an accelerator "
                f"such as L4, or a node label, of which there are {', '.join(known)}"
            )
        found.append(Devices(type_, count, labels))
    for node in _nodes():
        here = {one for one in found if _has(node, dict(one.labels)) and node["Resources"].get(RESOURCES[one.type], 0)}
        if len({one.type for one in here}) < len(here):
            raise UsageError("--placement: two of its kinds are on one node, whose devices would count twice")
    return found


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _has(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return labels.items() <= node["Labels"].items()


def _count(resource: str, labels: Mapping[str, str]) -> int:
    # Whole devices of each node: a bundle cannot lie across two.
    return sum(int(node["Resources"].get(resource, 0)) for node in _nodes() if _has(node, labels))


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What runs where.

    Attributes:
        pools: the levels (from 1) of each pool.
        devices: what each is on.
        costs: float64 (K,) for each pool, seconds per sample of each level there.
        cell_devices: at most so many devices in a cell.
        forecasts: of the placements that were weighed, the chosen one first; none where it was given.
        timed: whether the levels were, for that, or it goes by the ladder's costs.
    """

    pools: tuple[range, ...]
    devices: list[Devices]
    costs: list[np.ndarray]
    cell_devices: int
    forecasts: list[Forecast]
    timed: bool


def arrange(job: Job, ladder: Ladder, placement: Placement | None, devices: int | None, remote: bool) -> Arrangement:
    """A placement on the connected cluster's devices; without one, that of the best forecast.

    Args:
        devices: so many, if the placement does not name them; None for all.
        remote: whether Ray is elsewhere, rather than started by this process.

    Raises:
        UsageError: there are not the devices, or not the memory for any placement.
    """
    if placement and any(placement.kinds):
        there = find_devices(placement.kinds, job.device)
    else:
        there = [Devices(job.device, count_devices(job.device, devices))] * (len(placement.pools) if placement else 1)
    cost = {one: ladder.cost(one.type) for one in there}
    timed = False
    # With one pool for all levels there is nothing to weigh.
    if (not placement or len(placement.pools) > 1) and is_long(job, ladder, there):
        found = {one: measured_cost(job, ladder, one, remote) for one in cost}
        cost |= {one: measured for one, measured in found.items() if measured is not None}
        timed = any(measured is not None for measured in found.values())
    if placement:
        return Arrangement(placement.pools, there, [cost[one] for one in there], CELL_DEVICES, [], timed)
    forecasts = choose_placement(job, ladder, there[0].count, cost[there[0]])
    best, count = forecasts[0], len(forecasts[0].layout.pools)
    costs = [cost[there[0]]] * count
    return Arrangement(best.layout.pools, there * count, costs, best.cell_devices, forecasts, timed)


def is_long(job: Job, ladder: Ladder, devices: Sequence[Devices]) -> bool:
    """Whether the costs of a job's levels are worth being measured."""
    load = pool_loads(evaluations(job), [range(1, len(ladder.levels) + 1)], ladder.cost(job.device))
    return job.num * float(load[0]) / sum(one.count for one in dict.fromkeys(devices)) > LONG_SECONDS


def measured_cost(job: Job, ladder: Ladder, devices: Devices, remote: bool) -> np.ndarray | None:
    """float64 (K,): seconds per sample of each level in the job's blocks and precision, timed on one of the devices.

    Where they are not `remote` and CPU cores, by this process, which needs no start. Levels that the plan does not call
    have the ladder's costs. None if a device has not done it within a minute, as when others use them all.

    Raises:
        UsageError: the ladder cannot be loaded there.
    """
    cost = ladder.cost(devices.type)
    numbers = [k for k, calls in enumerate(job.expected_calls(), 1) if calls or k == 1]
    if devices.type == "cpu" and not remote:
        cost[[k - 1 for k in numbers]] = time_levels(job, numbers)
        return cost
    # For this call only: the process would keep its memory of a GPU.
    task: Any = ray.remote(max_calls=1)(time_levels)
    here = {"num_gpus": 1, "num_cpus": 0} if devices.type == "cuda" else {"num_cpus": 1}
    timed = task.options(**here, label_selector=dict(devices.labels)).remote(replace(job, device=devices.type), numbers)
    if not ray.wait([timed], timeout=DEVICE_SECONDS)[0]:
        ray.cancel(timed, force=True)
        return None
    try:
        cost[[k - 1 for k in numbers]] = ray.get(timed)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except RayError:
        return None
    return cost


def choose_placement(job: Job, ladder: Ladder, devices: int, cost: np.ndarray) -> list[Forecast]:
    """Placements that the connected cluster has memory for, simulated, the one that ends first before the others.

    `cost` (K,) is the seconds per sample of each level.

    Raises:
        UsageError: there is none.
    """
    kind = Kind(job.device, devices, cost, _memory(job.device), OVERHEADS[job.device])
    found = [forecast(job, layout) for layout in layouts(job, ladder.weights, kind)]
    return sorted(found, key=lambda one: one.seconds)


def _memory(device: str) -> float:
    """Bytes of the smallest device: of one GPU of each node, or of a node's memory per CPU core.

    Raises:
        UsageError: no GPU is free to be asked.
    """
    if device == "cuda":
        kind: Any = ray.remote(num_cpus=0, num_gpus=0.01, max_calls=1)(_gpu_bytes)
        nodes = [node["NodeID"] for node in _nodes() if node["Resources"].get("GPU", 0)]
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        asked = [kind.options(scheduling_strategy=one).remote() for one in there]
        answered, late = ray.wait(asked, num_returns=len(asked), timeout=DEVICE_SECONDS)
        for one in late:
            ray.cancel(one, force=True)
        if not answered:
            raise UsageError(
                "--placement auto: others use all GPUs, whose memory it asks for; wait for them, or name the placement"
            )
        return float(min(ray.get(answered)))
    found = [node["Resources"] for node in _nodes()]
    return min(float(one["memory"] / one["CPU"]) for one in found if one.get("CPU", 0) >= 1)


def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def _reserve(kinds: Sequence[Devices], counts: Sequence[int]) -> PlacementGroup:
    """A bundle of one device for each of `counts` devices of each kind, kind by kind."""
    of_bundle = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    bundles = [{RESOURCES[kind.type]: 1.0} for kind in of_bundle]
    selectors = [dict(kind.labels) for kind in of_bundle]
    if not any(selectors):
        return placement_group(bundles, strategy="PACK")
    return placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)


def run_ray(
    job: Job,
    ladder: Ladder,
    out: Path,
    shards: Sequence[int],
    pools: Sequence[range],
    devices: Sequence[Devices],
    costs: Sequence[np.ndarray],
    cell_devices: int = CELL_DEVICES,
    coalesce: int = 1,
) -> Iterator[Progress]:
    """Make the given shards on the connected Ray, with a snapshot twice a second and one at the end.

    `pools` are the levels (from 1) of each pool, and `devices` what each is on, and `costs` (K,) the seconds per
    sample of each level there; pools on equal devices divide them by their load. Each cell of at most `cell_devices`
    devices, or of one of each kind, has its own actors. This process does a few calls per cell twice a second. At most
    `coalesce` blocks are evaluated together by another pool than the first; more than one changes the rounding.

    Raises:
        PoolError: actors or coordinators die faster than they work.
        NonFiniteError: a block ended with NaN or infinite values.
    """
    began = time.monotonic()
    counts = evaluations(job)
    load = seat_loads(counts, pools, costs, [OVERHEADS[one.type] for one in devices], job.block_size)
    names = ["+".join(ladder.levels[k - 1].name for k in pool) for pool in pools]
    kinds = list(dict.fromkeys(devices))
    count = min(-(-sum(kind.count for kind in kinds) // cell_devices), *(kind.count for kind in kinds))
    sizes = [[kind.count // count + (index < kind.count % count) for kind in kinds] for index in range(count)]
    # This process owns the devices: they are free again when it ends, however it ends.
    groups = [_reserve(kinds, size) for size in sizes]
    coordinator: Any = ray.remote(Coordinator)
    of_pool = [kinds.index(one) for one in devices]
    # A lone one beside the driver, where no lost node takes it: its successor would wait for all devices.
    strategy: Any = "DEFAULT"
    if count == 1:
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)

    def writers(size: Sequence[int]) -> int:
        seconds = OVERHEADS["cpu"].write * math.prod(ladder.sample_shape[1:]) / WRITTEN_PIXELS
        return writer_count(sum(size) / max(float(load.sum()), 1e-9), seconds)

    def creator(size: Sequence[int], group: PlacementGroup) -> Callable[[], Any]:
        seats = allot_kinds(load, of_pool, size)
        arguments = (job, out.absolute(), pools, names, devices, seats, group, ladder.labels, coalesce, writers(size))
        return lambda: coordinator.options(num_cpus=0, scheduling_strategy=strategy).remote(*arguments)

    cells = [Cell(creator(size, group), sum(size), job, out) for size, group in zip(sizes, groups, strict=True)]
    todo = deque(shards)
    try:
        # A cell whose devices others use does not hold up the end, if it has been given nothing.
        while todo or not all(cell.finished or cell.idle for cell in cells):
            for cell in cells:
                todo.extendleft(reversed(cell.poll()))
            while todo and (hungry := [cell for cell in cells if cell.wants and (cell.ready or len(cells) == 1)]):
                min(hungry, key=lambda cell: cell.queued / cell.devices).give(todo.popleft())
            # As long as a cell may lose its devices, another must be there to take its shards.
            if not todo and (len(cells) == 1 or all(cell.spent for cell in cells)):
                for cell in cells:
                    cell.close()
            if all(cell.progress for cell in cells):
                yield replace(merged([cell.total() for cell in cells]), seconds=time.monotonic() - began)
            ray.wait([cell.run for cell in cells if not cell.finished] or [cells[0].run], timeout=POLL_SECONDS)
    finally:
        for cell, group in zip(cells, groups, strict=True):
            ray.kill(cell.coordinator)
            remove_placement_group(group)
