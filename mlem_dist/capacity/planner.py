"""Capacity planning: forecasts of a workload on a cluster, by simulation, before anyone pays for the cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import numpy as np

from mlem_dist.capacity.placement import (
    CELL_DEVICES,
    SCORE,
    Costs,
    Devices,
    Seat,
    allot_kinds,
    level_loads,
    pools_text,
)
from mlem_dist.capacity.simulation import Busy, CellSimulation, Overheads, pool_seconds, timed_segments
from mlem_dist.engine.job import Workload
from mlem_dist.engine.program import Program, evaluations, levels_of
from mlem_dist.errors import UsageError
from mlem_dist.ladder.calibration import measured_costs
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.sizes import WEIGHT_SHARE
from mlem_dist.solver.costs import LevelCosts, as_costs

_CORE = Overheads(
    call=0.002,
    trip=0.006,
    latency=0.001,
    event=0.0012,
    write=8e-5,
    poll=0.003,
    slowdown=1.06,
    sliced=1.0,
    shared=True,
    state=4 * 32 * 32,
)
OVERHEADS = {
    "cpu": _CORE,
    "cuda": replace(_CORE, call=0.0005, trip=0.002, slowdown=1.0, sliced=1.1, shared=False),
}
"""Measured overheads by device type.

coordinator.py and writer.py in benchmarks/runtime measure them. For a GPU, gpu.py measures its losses within a block
and between actors that take turns; its `call` and `trip` are the values whose forecasts are nearest to runs on a GPU.
"""

WRITTEN_PIXELS = 32 * 32
"""Pixels of an image for which the writing time is measured."""

BUSY_COORDINATOR = 0.5
"""Largest share of its time that a coordinator may be busy; above that, cells are made smaller."""

SIMULATED = 3
"""Number of the most promising placements that are simulated."""

SIMULATED_BLOCKS, LEAST_BLOCKS = 20, 200
"""Simulated blocks of a cell, per device and at least, as far as the cell has that many; the rest is extrapolated."""


def overheads_of(device: str, ladder: Ladder) -> Overheads:
    """Overheads of the runtime on "cpu" or "cuda" devices, for samples of the ladder."""
    known = OVERHEADS[device]
    write = known.write * math.prod(ladder.image_shape[1:]) / WRITTEN_PIXELS
    return replace(known, write=write, state=state_bytes(ladder.sample_shape))


def costs_of(ladder: Ladder, alone: np.ndarray, device: str) -> Costs:
    """Costs of the ladder's levels and stages on "cpu" or "cuda", from the time of each level alone.

    `alone` is float64 (K,), in seconds per sample.
    """
    shared = ladder.shared_costs(alone) if ladder.guided else None
    return Costs(alone, ladder.cost_beside(alone), ladder.stage_seconds(device), ladder.stage_bytes, shared)


def state_bytes(sample_shape: Sequence[int]) -> int:
    """Bytes of a sample's state in float32."""
    return 4 * math.prod(sample_shape)


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of devices.

    Attributes:
        name: a name such as "h100".
        devices: type, number and labels of the devices.
        costs: costs of the levels on the devices.
        overheads: overheads of the runtime on the devices.
        memory: bytes per device; infinite if not known.
    """

    name: str
    devices: Devices
    costs: Costs
    overheads: Overheads
    memory: float = np.inf

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.devices.count


def cluster_kind(
    devices: Devices, ladder: Ladder, cost: np.ndarray, memory: float = np.inf, score: float = 0.0
) -> Kind:
    """The planner's kind for devices of the cluster.

    `cost` (K,) is each level's time alone and `score` that of scores, in seconds per sample; 0 if there are none.
    """
    costs = costs_of(ladder, cost, devices.type)
    if score:
        costs = replace(costs, stages={**costs.stages, SCORE: score})
    return Kind(devices.type, devices, costs, overheads_of(devices.type, ladder), memory)


def read_kinds(ladder: Ladder, devices: str, costs: Sequence[str]) -> list[Kind]:
    """The kinds of devices in a text such as "h100:64:80,l4:256", with costs in ms per sample as in "h100=0.01,0.2,1".

    A kind without given costs has the ladder's costs for a device of that name. If there are none, it has the costs, at
    the largest batch, of the calibrated device in whose name it occurs. "cpu" and kinds calibrated on a CPU are CPU
    cores; all others are GPUs.

    Raises:
        UsageError: if an entry cannot be read, occurs twice, or has no costs, or if costs are given for another kind.
    """
    given: dict[str, np.ndarray] = {}
    for text in costs:
        name, _, values = text.partition("=")
        try:
            given[name] = np.array([float(value) / 1e3 for value in values.split(",")])
        except ValueError:
            given[name] = np.empty(0)
        if len(given[name]) != len(ladder.levels) or not (given[name] > 0).all():
            raise UsageError(
                f"`cost` {text!r}: expected KIND= and {len(ladder.levels)} positive numbers, ms per sample by level"
            )
    kinds: dict[str, Kind] = {}
    for text in devices.split(","):
        name, *numbers = text.split(":")
        try:
            count, memory = int(numbers[0]), float(numbers[1]) * 2**30 if numbers[1:] else np.inf
        except (ValueError, IndexError):
            count = memory = 0
        if not name or len(numbers) > 2 or count < 1 or not memory > 0:
            raise UsageError(f"`pool_devices`: {text!r}, expected KIND:COUNT or KIND:COUNT:GIB such as h100:64:80")
        if name in kinds:
            raise UsageError(f"`pool_devices`: {name} stands there twice")
        device, cost = measured_costs(ladder, name)
        if name in given:
            cost = given.pop(name)
        if cost is None:
            raise UsageError(
                f"no costs of {name!r} are known for ladder {ladder.name!r}; measure them there with `mlem-dist "
                f"calibrate`, or give `cost` {name}=MS,MS,... with ms per sample of each level"
            )
        overheads = overheads_of(device, ladder)
        kinds[name] = Kind(name, Devices(device, count), costs_of(ladder, cost, device), overheads, memory)
    if given:
        raise UsageError(f"`cost` {next(iter(given))}=...: not one of the `pool_devices`, {', '.join(kinds)}")
    return list(kinds.values())


@dataclass(frozen=True, eq=False)
class Layout:
    """Pools, and the kind of devices of each; the pools of a kind divide its devices by their load.

    Attributes:
        pools: the levels of each pool; pools of stages have none, and come last.
        kinds: the kind of devices of each pool.
        held: bytes of the weights that an actor of each pool holds; empty if the devices' memory does not matter.
        stages: the stages of the last pools. With one pool for all levels, its actors also do the work of stages, but
            for scores.
    """

    pools: tuple[range, ...]
    kinds: tuple[Kind, ...]
    held: tuple[float, ...] = ()
    stages: tuple[str, ...] = ()

    @property
    def level_pools(self) -> tuple[range, ...]:
        """The pools of levels, without those of stages."""
        return self.pools[: len(self.pools) - len(self.stages)]

    @property
    def groups(self) -> dict[Kind, list[int]]:
        """The indices of the pools on each kind."""
        return {kind: [i for i, other in enumerate(self.kinds) if other is kind] for kind in self.kinds}

    @property
    def devices(self) -> int:
        """Number of devices of all kinds."""
        return sum(kind.count for kind in self.groups)

    def cells(self, most: int) -> list[list[int]]:
        """Numbers of devices of each kind, in the order of `groups`, in each cell; the first cell has the most.

        A cell has at most `most` devices in all, provided that every kind has a device for each cell.
        """
        counts = [kind.count for kind in self.groups]
        cells = min(-(-self.devices // most), *counts)
        return [[count // cells + (cell < count % cells) for count in counts] for cell in range(cells)]

    def seats(self, load: np.ndarray, cell: Sequence[int]) -> list[list[Seat]]:
        """Seats of each pool for its `load`, in a cell with the given numbers of devices of each kind."""
        kinds = list(self.groups)
        return allot_kinds(load, [kinds.index(kind) for kind in self.kinds], cell)

    def fits(self, load: np.ndarray, cell_devices: int) -> bool:
        """Whether the actors' weights fit into the devices' memory, in cells of at most `cell_devices` devices."""
        # Cells may differ: a smaller cell may seat pools on one device that have separate devices in a larger cell.
        return not self.held or all(self._fits(load, cell) for cell in {*map(tuple, self.cells(cell_devices))})

    def _fits(self, load: np.ndarray, cell: Sequence[int]) -> bool:
        memory = np.repeat([kind.memory for kind in self.groups], cell)
        held = np.zeros(len(memory))
        for seats, of_actor in zip(self.seats(load, cell), self.held, strict=True):
            for seat in seats:
                held[seat.device] += of_actor
        return bool((held <= WEIGHT_SHARE * memory).all())

    @property
    def names(self) -> list[str]:
        """Names of the pools, such as "1-3@h100"."""
        texts = [*(pools_text([pool]) for pool in self.level_pools), *self.stages]
        return [f"{text}@{kind.name}" for text, kind in zip(texts, self.kinds, strict=True)]

    def __str__(self) -> str:
        return ",".join(self.names)


@dataclass(frozen=True)
class PoolForecast:
    """Forecast of a pool: its levels and kind of device, its actors in all cells, and the share of time they work.

    On GPUs, the pool's work is divided by the actors' shares of the devices. On CPU cores, which actors share as they
    need them, it is divided by all cores.
    """

    name: str
    actors: int
    busy: float


@dataclass(frozen=True, eq=False)
class Forecast:
    """Forecast of a workload on a layout.

    Attributes:
        layout: the layout.
        cells: number of cells, each with a coordinator.
        cell_devices: largest number of devices in a cell.
        images_per_second: rate of all cells when they are neither filling nor draining.
        ideal: images per second if devices did nothing but evaluate the levels that the simulated blocks call.
        seconds: time of all cells for the workload's images, from loaded levels to the last shard.
        pools: the pools in the order of their levels.
        coordinator: the share of its time that a coordinator works.
        level_seconds: float64 (K,), device seconds per image in each level.
        timeline: the first calls of one cell's actors.
    """

    layout: Layout
    cells: int
    cell_devices: int
    images_per_second: float
    ideal: float
    seconds: float
    pools: tuple[PoolForecast, ...]
    coordinator: float
    level_seconds: np.ndarray
    timeline: tuple[Busy, ...]

    @property
    def efficiency(self) -> float:
        """images_per_second / ideal."""
        return self.images_per_second / self.ideal

    @property
    def bottleneck(self) -> str:
        """The busiest part: the name of a pool, of a kind whose actors share all cores, or "coordinator"."""
        shares = {"coordinator": self.coordinator}
        for kind, indices in self.layout.groups.items():
            pools = [self.pools[i] for i in indices]
            shared = {kind.name: sum(pool.busy for pool in pools)} if kind.overheads.shared else {}
            shares |= shared or {pool.name: pool.busy for pool in pools}
        return max(shares, key=shares.__getitem__)


def with_stages(pools: Sequence[range], kinds: Sequence[Kind], held: tuple[float, ...] = ()) -> Layout:
    """The layout of pools of levels, with a pool for each stage on the first pool's kind.

    With one pool for all levels, scores alone have a pool of their own. `held` is as for `Layout`, for the pools of
    levels.
    """
    weights, stages = kinds[0].costs.stage_bytes, tuple(kinds[0].costs.stages)
    if len(pools) == 1:
        stages = tuple(stage for stage in stages if stage == SCORE)
        held = held and (held[0] + sum(weights.values()),)
    more = len(stages)
    every = held and (*held, *(weights.get(stage, 0.0) for stage in stages))
    return Layout((*pools, *[range(0)] * more), (*kinds, *[kinds[0]] * more), every, stages)


def forecast(workload: Workload, layout: Layout, cell_devices: int | None = None) -> Forecast:
    """Simulate one of the layout's cells, of at most `cell_devices` devices; all cells count as alike.

    The default limit is `CELL_DEVICES`. It is lower if a coordinator would be busy more than half of its time, as long
    as the levels fit into smaller cells.
    """
    if cell_devices is not None:
        return _simulate(workload, layout, cell_devices)
    simulated = _simulate(workload, layout, CELL_DEVICES)
    while simulated.coordinator > BUSY_COORDINATOR and min(simulated.cell_devices, layout.devices) > 1:
        fewer = max(1, min(simulated.cell_devices, layout.devices) // 4)
        if not layout.fits(seat_loads(workload, layout), fewer):
            break
        simulated = _simulate(workload, layout, fewer)
    return simulated


def _simulate(workload: Workload, layout: Layout, cell_devices: int) -> Forecast:
    """Simulate the cell with the most devices; cells differ by at most one device of each kind."""
    costs = [kind.costs for kind in layout.kinds]
    kinds, cells = list(layout.groups), layout.cells(cell_devices)
    seats = layout.seats(seat_loads(workload, layout), cells[0])
    programs = [timed_segments(Program(plan, layout.pools), costs) for plan in workload.first_plans]
    devices = [
        (replace(kind.devices, count=count), kind.overheads) for kind, count in zip(kinds, cells[0], strict=True)
    ]
    cell = CellSimulation(
        programs,
        seats,
        devices,
        workload.block_size,
        workload.shard_size // workload.block_size,
        len(cells),
        dict(zip(layout.stages, range(len(layout.pools) - len(layout.stages), len(layout.pools)), strict=True)),
        layout.kinds[0].costs.stages,
    )

    part = sum(cells[0]) / layout.devices
    blocks = max(1, round(-(-workload.num // workload.block_size) * part))
    simulated = min(blocks, max(LEAST_BLOCKS, SIMULATED_BLOCKS * sum(cells[0])))
    trace = cell.run(simulated)
    # Blocks per second while the cell is neither filling nor draining, or over all blocks if all are simulated.
    rate = simulated / trace.seconds if simulated == blocks else trace.blocks_per_second
    seconds = simulated / rate

    # The load of the simulated blocks: if they are few, none of them may call the costly levels.
    times = np.bincount(np.arange(simulated) % len(programs), minlength=len(programs))
    load = times @ [pool_seconds(program, len(layout.pools)) for program in programs] / simulated
    load += stage_loads(layout)
    ideal = min(kind.count / max(load[indices].sum(), 1e-300) for kind, indices in layout.groups.items())
    pools = [
        PoolForecast(
            name,
            len(seated) * len(cells),
            trace.busy[i] / seconds / _devices(kind, seated, cells[0][kinds.index(kind)]),
        )
        for i, (name, kind, seated) in enumerate(zip(layout.names, layout.kinds, seats, strict=True))
    ]
    return Forecast(
        layout=layout,
        cells=len(cells),
        cell_devices=cell_devices,
        images_per_second=rate / part * workload.block_size,
        ideal=float(ideal),
        seconds=trace.seconds + (blocks - simulated) / rate,
        pools=tuple(pools),
        coordinator=trace.coordinator / seconds,
        level_seconds=level_loads(evaluations(workload), layout.pools, costs).sum(0),
        timeline=tuple(trace.work),
    )


def seat_loads(workload: Workload, layout: Layout) -> np.ndarray:
    """Expected device seconds per sample in each pool, float64 (pools,), with the time of its calls and trips."""
    counts, kinds = evaluations(workload), layout.kinds
    loads = level_loads(counts, layout.pools, [kind.costs for kind in kinds]).sum(1) + stage_loads(layout)
    loads *= [kind.overheads.slowdown for kind in kinds]
    asks = np.zeros(len(kinds))
    for together, count in counts.items():
        away = np.array([any(level in pool for level, _ in together) for pool in layout.pools])
        away[0] = False
        # A step that asks other pools ends a segment on the first pool.
        away[0] = away.any()
        asks += count * away
    loads += asks * [kind.overheads.call + kind.overheads.trip for kind in kinds] / workload.block_size
    return np.asarray(loads)


def stage_loads(layout: Layout) -> np.ndarray:
    """Seconds per sample of stages in each pool, float64 (pools,)."""
    loads = np.zeros(len(layout.pools))
    seconds = layout.kinds[0].costs.stages
    if layout.stages:
        loads[-len(layout.stages) :] = [seconds[stage] for stage in layout.stages]
    loads[0] += sum(time for stage, time in seconds.items() if stage not in layout.stages)
    return loads


def _devices(kind: Kind, seats: Sequence[Seat], of_cell: int) -> float:
    """Number of devices over which a pool's work is spread, in a cell with `of_cell` devices of the kind."""
    return of_cell if kind.overheads.shared else sum(seat.share for seat in seats) or 1.0


@dataclass(frozen=True, eq=False)
class Capacity:
    """Forecasts of groups of devices that work side by side, each on its part of the images."""

    parts: tuple[Forecast, ...]

    @property
    def images_per_second(self) -> float:
        """Images per second of all parts together."""
        return sum(part.images_per_second for part in self.parts)

    @property
    def seconds(self) -> float:
        """Seconds from loaded levels to the last shard; the parts share the list of shards and end together."""
        return sum(part.seconds * part.images_per_second for part in self.parts) / self.images_per_second

    def level_hours(self, num: int) -> np.ndarray:
        """float64 (K,): device hours in each level for `num` images."""
        seconds = sum(part.level_seconds * part.images_per_second for part in self.parts)
        return np.asarray(seconds) * num / self.images_per_second / 3600

    def __str__(self) -> str:
        return " + ".join(str(part.layout) for part in self.parts)


def plan_capacity(workload: Workload, weight_bytes: np.ndarray | LevelCosts, kinds: Sequence[Kind]) -> list[Capacity]:
    """Ways to use the devices, the fastest first.

    One way lets every kind work on its own, by its fastest placement of the levels. Each other way pairs two kinds, one
    with the lower levels and one with the upper levels, and lets the other kinds work on their own.

    Args:
        workload: the images to make.
        weight_bytes: bytes of the levels' weights, float64 (K,) if they share none.
        kinds: the kinds of devices, with distinct names.

    Raises:
        UsageError: if the ladder fits on no kind alone and on no pair.
    """
    alone: dict[Kind, Forecast] = {}
    unfit: list[UsageError] = []
    for kind in kinds:
        try:
            choices = layouts(workload, weight_bytes, kind)
        except UsageError as error:
            unfit.append(error)
        else:
            alone[kind] = _fastest(_part(workload, kind.count, kinds), choices)
    splits = [tuple(alone.values())] if alone else []
    for lower, upper in permutations(kinds, 2):
        if pairs := _paired(workload, weight_bytes, lower, upper):
            pair = _fastest(workload, pairs)
            splits.append((pair, *(fastest for kind, fastest in alone.items() if kind not in (lower, upper))))
    if not splits:
        raise unfit[0]
    capacities = [_shared(workload, parts) for parts in splits]
    return sorted(capacities, key=lambda capacity: -capacity.images_per_second)


def _part(workload: Workload, count: int, kinds: Sequence[Kind]) -> Workload:
    """The workload with the share of images that `count` devices make if all devices are equally fast."""
    return replace(workload, num=max(1, round(workload.num * count / sum(kind.count for kind in kinds))))


def _shared(workload: Workload, parts: Sequence[Forecast]) -> Capacity:
    """The capacity of parts that divide the images in proportion to their speed."""
    total = sum(part.images_per_second for part in parts)

    def own(part: Forecast) -> Forecast:
        images = max(1, round(workload.num * part.images_per_second / total))
        return forecast(replace(workload, num=images), part.layout)

    return Capacity(tuple(map(own, parts)))


def _fastest(workload: Workload, choices: Sequence[Layout]) -> Forecast:
    forecasts = [forecast(workload, layout) for layout in choices]
    return max(forecasts, key=lambda result: result.images_per_second)


def layouts(workload: Workload, weight_bytes: np.ndarray | LevelCosts, kind: Kind) -> list[Layout]:
    """The most promising placements on one kind, and the most divided one.

    Raises:
        UsageError: if no placement fits.
    """
    every = candidates(workload, weight_bytes, kind)
    divided = max(every, key=lambda layout: len(layout.pools))
    return list(dict.fromkeys([*every[:SIMULATED], divided]))


def candidates(workload: Workload, weight_bytes: np.ndarray | LevelCosts, kind: Kind) -> list[Layout]:
    """Every placement that fits on the devices of a kind, in increasing order of the device time per sample.

    Raises:
        UsageError: if no placement fits.
    """
    levels = len(weight_bytes)
    fitting = []
    for cuts in product((False, True), repeat=levels - 1):
        starts = [1, *(k + 2 for k, cut in enumerate(cuts) if cut), levels + 1]
        pools = tuple(map(range, starts, starts[1:]))
        layout = with_stages(pools, (kind,) * len(pools), _held_bytes(workload, weight_bytes, pools))
        load = seat_loads(workload, layout)
        if layout.fits(load, CELL_DEVICES):
            fitting.append((float(load.sum()), len(pools), layout))
    if not fitting:
        every = as_costs(weight_bytes).of(range(1, levels + 1))
        raise UsageError(
            f"the ladder's weights take {every / 2**30:.3g} GiB, and no placement of its levels fits on "
            f"{kind.count} devices of {kind.memory / 2**30:.3g} GiB; use more devices or larger ones"
        )
    return [layout for *_, layout in sorted(fitting, key=lambda entry: entry[:2])]


def _held_bytes(workload: Workload, weight_bytes: np.ndarray | LevelCosts, pools: Sequence[range]) -> tuple[float, ...]:
    """Bytes of the weights that an actor of each pool holds, in the workload's precision."""
    share = 0.5 if workload.precision in ("bfloat16", "float16") else 1.0
    of_pool = levels_of(evaluations(workload), pools)
    return tuple(share * as_costs(weight_bytes).of(levels) for levels in of_pool)


def _paired(workload: Workload, weight_bytes: np.ndarray | LevelCosts, lower: Kind, upper: Kind) -> list[Layout]:
    """Layouts of two pools, one on each kind, at the most promising cuts between levels."""
    counts = evaluations(workload)
    pairs = []
    for cut in range(2, len(weight_bytes) + 1):
        pools = (range(1, cut), range(cut, len(weight_bytes) + 1))
        layout = with_stages(pools, (lower, upper), _held_bytes(workload, weight_bytes, pools))
        load = level_loads(counts, pools, [lower.costs, upper.costs]).sum(1)
        load[0] += sum(lower.costs.stages.values())
        if load[1] > 0 and layout.fits(load, CELL_DEVICES):
            pairs.append((min(lower.count / load[0], upper.count / load[1]), layout))
    return [layout for _, layout in sorted(pairs, key=lambda pair: -pair[0])[:SIMULATED]]


def marginal(workload: Workload, best: Capacity) -> dict[str, float]:
    """Images per second that one more device of each kind would add, averaged over a sixteenth more devices."""
    gains = {}
    for part in best.parts:
        for kind in part.layout.groups:
            more = max(1, kind.count // 16)
            larger = replace(kind, devices=replace(kind.devices, count=kind.count + more))
            layout = replace(
                part.layout, kinds=tuple(larger if other is kind else other for other in part.layout.kinds)
            )
            images = round(workload.num * part.images_per_second / best.images_per_second)
            rate = forecast(replace(workload, num=max(1, images)), layout).images_per_second
            gains[kind.name] = (rate - part.images_per_second) / more
    return gains


def capacity_report(
    ladder: Ladder, num: int, capacities: Sequence[Capacity], gains: Mapping[str, float]
) -> dict[str, Any]:
    """The content of `capacity_table` as JSON-ready values."""
    names = [level.name for level in ladder.levels]
    return {
        "num": num,
        "placements": [
            {
                "images_per_second": capacity.images_per_second,
                "hours": capacity.seconds / 3600,
                "device_hours": dict(zip(names, capacity.level_hours(num).tolist(), strict=True)),
                "parts": [
                    {
                        "placement": str(part.layout),
                        "devices": {kind.name: kind.count for kind in part.layout.groups},
                        "cells": part.cells,
                        "images_per_second": part.images_per_second,
                        "efficiency": part.efficiency,
                        "bottleneck": part.bottleneck,
                        "coordinator_busy": part.coordinator,
                        "pools": [{"pool": p.name, "actors": p.actors, "busy": p.busy} for p in part.pools],
                    }
                    for part in capacity.parts
                ],
            }
            for capacity in capacities
        ],
        "images_per_second_of_one_more": dict(gains),
    }
