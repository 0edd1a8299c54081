"""A discrete-event simulation of one cell: its pools, transfers, coordinator and writers, event by event."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from types import MappingProxyType
from typing import Any

import numpy as np
import simpy

from mlem_dist.capacity.placement import Costs, Devices, Seat
from mlem_dist.capacity.policies import POLL_SECONDS, QUEUED_BLOCKS_PER_DEVICE, SLOTS, trajectory_depth, writer_count
from mlem_dist.engine.program import Program

Process = Generator[simpy.Event, Any, None]

RECORDED = 1000


@dataclass(frozen=True)
class Overheads:
    """Costs of the runtime on one kind of device besides the levels, in seconds unless stated otherwise.

    Attributes:
        call: an actor's time for a call, besides its evaluations: arguments, results, transfer.
        trip: time that each of two actors spends on sending a block's state from one to the other and back.
        latency: time from a call to its start, if the actor is free.
        event: the coordinator's own time per call.
        write: a core's time to write one sample into a shard.
        poll: the driver's time per cell and round.
        slowdown: ratio of a level's time in an actor to its time alone: noise, closed forms, caches, Ray's processes.
        sliced: ratio of a level's time when several actors take turns on the device to its time when one actor has it.
        shared: whether actors move freely between a cell's devices of this kind, as processes do between CPU cores.
            Calls, trips and writing then take the devices' time; otherwise devices may serve other actors meanwhile.
        state: size of a sample's state, in bytes.
    """

    call: float
    trip: float
    latency: float
    event: float
    write: float
    poll: float
    slowdown: float
    sliced: float
    shared: bool
    state: int


@dataclass(frozen=True)
class TimedSegment:
    """Times of a segment, in seconds per sample: on its own actor, then on other pools as (pool, seconds)."""

    local: float
    asks: tuple[tuple[int, float], ...]


def timed_segments(program: Program, costs: Sequence[Costs]) -> tuple[TimedSegment, ...]:
    """The times of a program's segments, by the costs of levels on the devices of each pool.

    A run in closed form takes as long as a call of level 1.
    """
    timed = []
    for segment in program.segments:
        local = 0.0
        for turn in segment.turns:
            local += sum(costs[0].of(turn.calls).values()) + (float(costs[0].alone[0]) if turn.closed else 0.0)
        asks = tuple((ask.pool, sum(costs[ask.pool].of(ask.calls).values())) for ask in segment.asks)
        timed.append(TimedSegment(local, asks))
    return tuple(timed)


def pool_seconds(segments: Sequence[TimedSegment], pools: int) -> np.ndarray:
    """Seconds per sample that a block's segments take in each pool, float64 (pools,)."""
    total = np.zeros(pools)
    for segment in segments:
        total[0] += segment.local
        for pool, seconds in segment.asks:
            total[pool] += seconds
    return total


@dataclass(frozen=True)
class Busy:
    """A call of an actor: its pool, its number there, and `start` and `stop` in seconds after the levels are loaded."""

    pool: int
    actor: int
    start: float
    stop: float


@dataclass
class Trace:
    """Record of a simulated cell, in seconds after all levels were loaded.

    Attributes:
        blocks: the time at which each block was finished, in order.
        seconds: the time at which the last shard was written.
        busy: by pool, seconds in which its actors worked, without their waits for a device.
        coordinator: seconds in which the coordinator worked.
        writing: core seconds spent on writing.
        work: the actors' first `RECORDED` calls.
    """

    blocks: list[float] = field(default_factory=list)
    seconds: float = 0.0
    busy: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    coordinator: float = 0.0
    writing: float = 0.0
    work: list[Busy] = field(default_factory=list)

    @property
    def blocks_per_second(self) -> float:
        """Rate between a fifth and nine tenths of all blocks, while the cell is neither filling nor draining."""
        ended = np.array(self.blocks[len(self.blocks) // 5 : len(self.blocks) * 9 // 10])
        # The slope of a fitted line: the window's first and last blocks alone depend on which blocks end together.
        return float(np.polyfit(ended, np.arange(len(ended)), 1)[0])


@dataclass(frozen=True)
class Actor:
    """An actor of a pool: it does one call at a time. A level takes `slowdown` times its time alone."""

    pool: int
    number: int
    turn: simpy.Resource
    overheads: Overheads
    device: simpy.Resource
    slowdown: float


class CellSimulation:
    """A simulated cell, as `Coordinator`, `Pool` and the workers run it.

    Args:
        programs: the segments of each block; blocks use the programs in turn.
        seats: the seats of each pool.
        kinds: the devices of each kind, numbered kind by kind, and its overheads. The overheads of the first kind also
            hold for the coordinator, the writers and the driver.
        block_size: samples per block.
        shard_blocks: blocks per shard.
        cells: number of cells that the driver serves.
        stages: the pool of each stage that has one.
        stage_seconds: seconds per sample of each stage; the first pool does those that have no pool.
    """

    def __init__(
        self,
        programs: Sequence[tuple[TimedSegment, ...]],
        seats: Sequence[Sequence[Seat]],
        kinds: Sequence[tuple[Devices, Overheads]],
        block_size: int,
        shard_blocks: int,
        cells: int = 1,
        stages: Mapping[str, int] = MappingProxyType({}),
        stage_seconds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.stages, self.stage_seconds = stages, stage_seconds
        self.programs: Iterator[tuple[TimedSegment, ...]] = cycle(programs)
        self.block_size, self.shard_blocks = block_size, shard_blocks
        self.overheads = kinds[0][1]
        self.round = self.overheads.poll * cells
        self.env = env = simpy.Environment()
        # Each device's overheads, and the resource that its actors wait for: the device itself, or any of its kind.
        self.devices: list[tuple[Overheads, simpy.Resource]] = []
        for devices, overheads in kinds:
            shared = simpy.Resource(env, devices.count)
            self.devices += [
                (overheads, shared if overheads.shared else simpy.Resource(env)) for _ in range(devices.count)
            ]
        self.actors_on_device = Counter(seat.device for actors in seats for seat in actors)
        seconds = np.mean([pool_seconds(program, len(seats)).sum() for program in programs])
        seconds += sum(stage_seconds.values())
        writers = writer_count(len(self.devices) / max(float(seconds), 1e-9), self.overheads.write)
        self.cores = self.devices[0][1] if self.overheads.shared else simpy.Resource(env, writers)
        self.coordinator = simpy.Resource(env)
        self.writing = simpy.Resource(env, writers)
        types = [devices.type for devices, _ in kinds for _ in range(devices.count)]
        depth = trajectory_depth(types, len(seats[0]), sum(map(bool, seats)), block_size * self.overheads.state)
        self.runners = depth * len(seats[0])
        self.pools = [self._pool(index, actors, SLOTS if index else depth) for index, actors in enumerate(seats)]
        self.todo = simpy.Store(env)
        self.parts = 0
        self.trace = Trace()

    def _pool(self, index: int, seats: Sequence[Seat], slots: int) -> simpy.Store:
        """A pool's free slots. They are taken in turn, which takes the least busy actor's slot except for ties."""
        store = simpy.Store(self.env)
        actors = []
        for number, seat in enumerate(seats):
            overheads, device = self.devices[seat.device]
            slowdown = overheads.slowdown * (overheads.sliced if self.actors_on_device[seat.device] > 1 else 1)
            actors.append(Actor(index, number, simpy.Resource(self.env), overheads, device, slowdown))
        store.items.extend(actors * slots)
        return store

    def run(self, blocks: int) -> Trace:
        """Simulate the making of the given number of blocks."""
        self.blocks = blocks
        self.env.process(self._driver())
        for _ in range(self.runners):
            self.env.process(self._runner())
        self.env.run()
        self.trace.seconds = max(self.trace.seconds, self.trace.blocks[-1])
        return self.trace

    def _driver(self) -> Process:
        left = self.blocks
        while left:
            while left and len(self.todo.items) < QUEUED_BLOCKS_PER_DEVICE * len(self.devices):
                shard = min(left, self.shard_blocks)
                for _ in range(shard):
                    self.todo.put(True)
                left -= shard
            yield self.env.timeout(POLL_SECONDS + self.round)
        for _ in range(self.runners):
            self.todo.put(False)

    def _runner(self) -> Process:
        while (yield self.todo.get()):
            yield from self._block(next(self.programs))
            self.trace.blocks.append(self.env.now)
            self.parts += 1
            if self.parts % self.shard_blocks == 0 or self.parts == self.blocks:
                yield from self._write(self.parts % self.shard_blocks or self.shard_blocks)

    def _block(self, program: tuple[TimedSegment, ...]) -> Process:
        yield from self._stage("encode")
        actor: Actor = yield self.pools[0].get()
        waited = False
        own = sum(seconds for stage, seconds in self.stage_seconds.items() if stage not in self.stages)
        for segment in program:
            yield from self._call(actor, segment.local + own, (waited + bool(segment.asks)) / 2)
            waited, own = bool(segment.asks), 0.0
            if segment.asks:
                yield simpy.AllOf(self.env, [self.env.process(self._ask(*ask)) for ask in segment.asks])
        self.pools[0].put(actor)
        yield from self._stage("decode")
        yield from self._stage("score")

    def _stage(self, stage: str) -> Process:
        if stage in self.stages:
            yield from self._ask(self.stages[stage], self.stage_seconds[stage])

    def _ask(self, pool: int, seconds: float) -> Process:
        actor: Actor = yield self.pools[pool].get()
        yield from self._call(actor, seconds, 1)
        self.pools[pool].put(actor)

    def _call(self, actor: Actor, seconds: float, trips: float) -> Process:
        lost = actor.overheads.call + trips * actor.overheads.trip
        with self.coordinator.request() as turn:
            yield turn
            yield self.env.timeout(self.overheads.event)
            self.trace.coordinator += self.overheads.event
        yield self.env.timeout(actor.overheads.latency)
        work = seconds * self.block_size * actor.slowdown
        with actor.turn.request() as turn:
            yield turn
            if not actor.overheads.shared:
                yield self.env.timeout(lost)
            with actor.device.request() as device:
                yield device
                start = self.env.now
                yield self.env.timeout(work + lost * actor.overheads.shared)
        self.trace.busy[actor.pool] += work + lost
        if len(self.trace.work) < RECORDED:
            self.trace.work.append(Busy(actor.pool, actor.number, start, self.env.now))

    def _write(self, blocks: int) -> Process:
        seconds = self.overheads.write * blocks * self.block_size
        with self.writing.request() as turn:
            yield turn
            with self.cores.request() as core:
                yield core
                yield self.env.timeout(seconds)
        self.trace.writing += seconds
        self.trace.seconds = self.env.now
