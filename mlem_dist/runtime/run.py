"""The driver of the Ray engine: it starts the cells, hands out shards, and relays progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlem_dist.capacity.placement import Devices
from mlem_dist.capacity.planner import overheads_of, seat_loads, state_bytes
from mlem_dist.capacity.policies import POLL_SECONDS, writer_count
from mlem_dist.engine.job import Job
from mlem_dist.engine.progress import Progress
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime.arrangement import Arrangement
from mlem_dist.runtime.cells import Cell, Cells
from mlem_dist.runtime.cluster import RESOURCES
from mlem_dist.runtime.coordinator import Coordinator
from mlem_dist.store import Location


def _reserve(kinds: Sequence[Devices], counts: Sequence[int]) -> PlacementGroup:
    """A placement group with one bundle per device: `counts` devices of each kind, kind by kind."""
    bundle_kinds = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    bundles = [{RESOURCES[kind.type]: 1.0} for kind in bundle_kinds]
    selectors = [dict(kind.labels) for kind in bundle_kinds]
    if not any(selectors):
        return placement_group(bundles, strategy="PACK")
    return placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)


def run_ray(
    job: Job,
    ladder: Ladder,
    out: Location,
    shards: Sequence[int],
    arrangement: Arrangement,
    coalesce: int = 1,
) -> Generator[Progress]:
    """Make the given shards on the connected Ray; yields a snapshot twice a second and one at the end.

    Pools on equal devices divide them by their load. Each cell has at least one device of each kind, and its own
    actors. This process makes a few calls per cell twice a second. Pools other than the first evaluate at most
    `coalesce` blocks together; more than one changes the rounding.

    Raises:
        PoolError: if actors or coordinators die faster than they work.
        UsageError: as `Pool.start`.
        RuntimeError: if Ray has died on this machine.
        NonFiniteError: if a block ends with NaN or infinite values.
    """
    began = time.monotonic()
    layout, load = arrangement.layout, seat_loads(job.workload, arrangement.layout)
    names = [*("+".join(ladder.levels[k - 1].name for k in pool) for pool in layout.level_pools), *layout.stages]
    devices = [kind.devices for kind in layout.kinds]
    kinds, sizes = list(layout.groups), layout.cells(arrangement.cell_devices)
    # This process owns the placement groups: the devices are free again when it ends, however it ends.
    groups = [_reserve([kind.devices for kind in kinds], size) for size in sizes]
    coordinator: Any = ray.remote(Coordinator)
    block_bytes = job.block_size * state_bytes(ladder.sample_shape)
    # A lone coordinator runs beside the driver, safe from lost nodes: a successor would wait for all devices.
    strategy: Any = "DEFAULT"
    if len(sizes) == 1:
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    def writers(size: Sequence[int]) -> int:
        written = overheads_of("cpu", ladder).write
        # Each shard has one writer, and the start of a process takes more than a small dataset.
        return min(writer_count(sum(size) / max(float(load.sum()), 1e-9), written), max(len(shards), 1))

    def creator(size: Sequence[int], group: PlacementGroup) -> Callable[[], Any]:
        seating = layout.pools, layout.stages, names, devices, layout.seats(load, size), group
        arguments = (job, out.absolute(), *seating, ladder.labels, coalesce, writers(size), block_bytes)
        return lambda: coordinator.options(num_cpus=0, scheduling_strategy=strategy).remote(*arguments)

    created = (
        Cell(creator(size, group), sum(size), job, out, began) for size, group in zip(sizes, groups, strict=True)
    )
    cells = Cells(list(created), shards)
    try:
        while not cells.done:
            cells.step()
            if progress := cells.progress():
                yield replace(progress, seconds=time.monotonic() - began)
            cells.wait(POLL_SECONDS)
    except GeneratorExit:
        cells.end_writes()
        raise
    finally:
        for cell, group in zip(cells.cells, groups, strict=True):
            ray.kill(cell.coordinator)
            remove_placement_group(group)
