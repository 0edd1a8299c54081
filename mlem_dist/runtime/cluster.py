"""The Ray engine's driver: connect or start Ray, run a coordinator, relay its progress."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime.cells import CELL_DEVICES, POLL_SECONDS, Cell, merged
from mlem_dist.runtime.coordinator import Coordinator
from mlem_dist.runtime.job import Job
from mlem_dist.runtime.placement import Candidate, allot, candidates, evaluations, pool_loads
from mlem_dist.runtime.progress import Progress

ANSWER_SECONDS = 10


def is_remote(address: str | None) -> bool:
    """Whether Ray is somewhere already, rather than to be started here."""
    return (address or os.environ.get("RAY_ADDRESS", "local")) != "local"


def connect(address: str | None) -> None:
    """Connect to the Ray at `address`, to the one that this process belongs to, or start one here.

    Raises:
        UsageError: nothing answers at the address within some seconds.
    """
    if address and address != "local":
        _check_answer(address)
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise UsageError(f"no Ray answers at {address or 'RAY_ADDRESS'}: {' '.join(str(error).split())}") from None


def _check_answer(address: str) -> None:
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(
            f"--address {address!r}: expected HOST:PORT of a Ray head, auto or local; from outside a cluster use "
            "`ray job submit`"
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
    resource = "GPU" if device == "cuda" else "CPU"
    # Whole devices of each node: a bundle cannot lie across two.
    found = sum(int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"])
    if found < (wanted or 1):
        raise UsageError(
            f"{wanted or 1} {resource}s are needed and Ray has {found}; "
            + ("use --device cpu or a cluster with GPUs" if device == "cuda" and not found else "lower --devices")
        )
    return wanted or found


def choose_placement(job: Job, ladder: Ladder, devices: int) -> list[Candidate]:
    """The placements that the connected cluster has memory for, the fastest first.

    Raises:
        UsageError: there is none.
    """
    return candidates(job, ladder.cost(job.device), ladder.weights, devices, _memory(job.device))


def _memory(device: str) -> float:
    """Bytes of the smallest device: of one GPU, or of a node's memory per CPU core."""
    if device == "cuda":
        kind: Any = ray.remote(_gpu_bytes)
        return float(ray.get(kind.options(num_cpus=0, num_gpus=0.01).remote()))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(float(found["memory"] / found["CPU"]) for found in nodes if found.get("CPU", 0) >= 1)


def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def run_ray(
    job: Job,
    ladder: Ladder,
    out: Path,
    shards: Sequence[int],
    pools: Sequence[range],
    devices: int,
    cell_devices: int = CELL_DEVICES,
) -> Iterator[Progress]:
    """Make the given shards on the connected Ray, with a snapshot twice a second and one at the end.

    `pools` are the levels (from 1) of each pool; each cell of at most `cell_devices` devices has its own. This process
    does a few calls per cell twice a second.

    Raises:
        PoolError: actors or coordinators die faster than they work.
        NonFiniteError: a block ended with NaN or infinite values.
    """
    began = time.monotonic()
    load = pool_loads(evaluations(job), pools, ladder.cost(job.device))
    names = ["+".join(ladder.levels[k - 1].name for k in pool) for pool in pools]
    count = -(-devices // cell_devices)
    sizes = [devices // count + (index < devices % count) for index in range(count)]
    # This process owns the devices: they are free again when it ends, however it ends.
    resource = "GPU" if job.device == "cuda" else "CPU"
    groups = [placement_group([{resource: 1}] * size, strategy="PACK") for size in sizes]
    kind: Any = ray.remote(Coordinator)

    def creator(size: int, group: PlacementGroup) -> Callable[[], Any]:
        seats = allot(load, size)
        return lambda: kind.options(num_cpus=0).remote(job, out.absolute(), pools, names, seats, group, ladder.labels)

    cells = [Cell(creator(size, group), size, job, out) for size, group in zip(sizes, groups, strict=True)]
    todo = deque(shards)
    try:
        while not all(cell.finished for cell in cells):
            for cell in cells:
                todo.extendleft(reversed(cell.poll()))
            while todo and (hungry := [cell for cell in cells if cell.wants]):
                min(hungry, key=lambda cell: cell.queued / cell.devices).give(todo.popleft())
            if not todo:
                for cell in cells:
                    cell.close()
            if all(cell.progress for cell in cells):
                yield replace(merged([cell.total() for cell in cells]), seconds=time.monotonic() - began)
            ray.wait([cell.run for cell in cells if not cell.finished] or [cells[0].run], timeout=POLL_SECONDS)
    finally:
        for cell, group in zip(cells, groups, strict=True):
            ray.kill(cell.coordinator)
            remove_placement_group(group)
