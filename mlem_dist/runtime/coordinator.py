"""The coordinator, which decides where each block runs. It handles references, never tensors, and needs no torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mlem_dist.capacity.placement import SCORE, Devices, Seat
from mlem_dist.capacity.policies import SLOTS, Load, Move, choose_move, trajectory_depth
from mlem_dist.engine.job import Job
from mlem_dist.engine.program import Ask, SegmentEnd
from mlem_dist.engine.progress import WAITS, Progress
from mlem_dist.engine.writer import Writer
from mlem_dist.runtime.actors import LevelActor, ScoreActor, StageActor, TrajectoryActor
from mlem_dist.runtime.batching import Batcher
from mlem_dist.runtime.pool import DEATHS, TRIES, Member, Pool, PoolError, cause
from mlem_dist.store import Location

WINDOW_SECONDS, WINDOW_CALLS = 2, 4

Parts = Sequence["ray.ObjectRef[Any]"]
"""References to a block's images and, if they are scored, to the columns of their scores."""

logger = logging.getLogger(__name__)


def lost(error: Exception) -> bool:
    """Whether an argument or a result of a call is lost, as when its node has died."""
    return isinstance(cause(error), ObjectLostError)


class Coordinator:
    """An asyncio actor that makes the shards of a job that it is given.

    Args:
        pools: the levels (from 1) of each pool; the last ones are pools of stages, without levels.
        stages: the stages of the last pools.
        names: the names of the pools, for messages.
        devices: the devices of each pool.
        seats: the seats of each pool; none for a pool that the plan never calls.
        group: a placement group with a bundle of one device for each device that the seats name.
        labels: class names.
        coalesce: largest number of blocks that pools other than the first evaluate together.
        writers: number of actors that write shards; they reserve no devices.
        block_bytes: size of a block's state, in bytes.
    """

    def __init__(
        self,
        job: Job,
        out: Location,
        pools: Sequence[range],
        stages: Sequence[str],
        names: Sequence[str],
        devices: Sequence[Devices],
        seats: Sequence[Sequence[Seat]],
        group: PlacementGroup,
        labels: Sequence[str],
        coalesce: int,
        writers: int,
        block_bytes: int,
    ) -> None:
        self.coalesce = coalesce
        self.job, self.pools, self.stages = job, tuple(pools), tuple(stages)
        self.stage_pools = dict(zip(self.stages, range(len(pools) - len(stages), len(pools)), strict=True))
        create: Any = ray.remote(Writer).options(num_cpus=0)
        writer_seats = [Seat(0, 0.0)] * writers
        self.writers = Pool("writers", writer_seats, SLOTS, lambda _: create.remote(job, out, tuple(labels)))
        self.seats, self.names, self.group = seats, names, group
        self.kinds, self.devices = devices, group.bundle_count
        types = {seat.device: kind.type for kind, pool_seats in zip(devices, seats, strict=True) for seat in pool_seats}
        self.depth = trajectory_depth([*types.values()], len(seats[0]), sum(map(bool, seats)), block_bytes)
        self.calls: Counter[int] = Counter()
        self.samples = self.blocks = 0
        self.state = "starting"
        self.began = time.monotonic()
        self.ready: float | None = None
        self.first_block: float | None = None
        self.running: dict[int, Pool] = {}
        self.batchers: dict[int, Batcher] = {}
        self.refused: set[tuple[int, int]] = set()
        # Numbers of blocks in flight, and of the blocks among them that wait for another pool.
        self.in_flight = self.waiting = 0
        self.runners: set[asyncio.Task[None]] = set()
        self.todo: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        # Rows of written shards that the driver may not know of yet, and the number of those that it knows of.
        self.written: deque[tuple[int, int]] = deque()
        self.writing: set[asyncio.Future[int]] = set()
        self.ending = False
        self.known = 0
        self.added = 0
        self.expected: int | None = None

    async def add(self, shard: int) -> None:
        """Add a shard to make."""
        for block in self.job.shard_blocks(shard):
            self.todo.put_nowait((shard, block))
        self.added += 1
        self._end_if_complete()

    async def close(self, shards: int) -> None:
        """Set the final number of shards; some may still be on their way, as calls overtake each other."""
        self.expected = shards
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if self.added == self.expected:
            self.todo.put_nowait(None)

    async def run(self) -> None:
        """Make every shard that is added, until there are no more.

        Raises:
            PoolError: if actors die faster than they work.
            UsageError: as `Pool.start`.
            NonFiniteError: if a block ends with NaN or infinite values.
        """
        await self._start_pools()
        self.made: dict[int, dict[int, Parts]] = {}
        self._add_runners(len(self.seats[0]))
        balancing = asyncio.create_task(self._balance())
        try:
            while self.runners:
                # With a time limit, as runners may join meanwhile.
                watched = self.runners | {balancing}
                done, _ = await asyncio.wait(watched, timeout=WINDOW_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                self.runners -= done
                for task in done:
                    task.result()
        finally:
            for task in (*self.runners, balancing):
                task.cancel()

    def _add_runners(self, actors: int) -> None:
        self.runners |= {asyncio.create_task(self._runner()) for _ in range(actors * self.depth)}

    async def _balance(self) -> None:
        """Move actors from pools with little to do to pools that hold up the others."""
        busy, queued, before = dict.fromkeys(self.running, 0.0), dict.fromkeys(self.running, False), time.monotonic()
        proposed = None
        while True:
            # A call counts only when it has ended, so a window must hold several calls.
            longest = max(pool.call_seconds for pool in self.running.values())
            await asyncio.sleep(max(WINDOW_SECONDS, WINDOW_CALLS * longest))
            seconds, before = time.monotonic() - before, time.monotonic()
            total = {i: pool.metrics.totals["busy_seconds"] for i, pool in self.running.items()}
            queue = {i: pool.queue > 0 or not i for i, pool in self.running.items()}
            loads = {
                i: Load(self.kinds[i], pool.working, (total[i] - busy[i]) / seconds, queued[i] and queue[i])
                for i, pool in self.running.items()
            }
            busy, queued, last = total, queue, proposed
            proposed = choose_move(list(loads.values()), self.refused)
            # One window may be chance, so two in a row must propose the same move.
            if proposed and proposed == last:
                await self._move(proposed)
                busy = {i: pool.metrics.totals["busy_seconds"] for i, pool in self.running.items()}
                before, proposed = time.monotonic(), None

    async def _move(self, move: Move) -> None:
        giver, taker = (list(self.running)[i] for i in (move.giver, move.taker))
        logger.info("an actor moves from pool %s to %s", self.names[giver], self.names[taker])
        await self.running[giver].leave(move.seat)
        if not await self.running[taker].join(move.seat):
            # The levels may not fit there beside the others; another attempt would fail, too.
            self.refused.add((move.taker, move.seat.device))
            await self.running[giver].rejoin(move.seat)
        elif taker == 0:
            self._add_runners(1)

    async def progress(self, known: int) -> Progress:
        """The progress so far; `known` is the number of written shards that the caller knows of."""
        while self.known < known:
            self.written.popleft()
            self.known += 1
        empty = [pool.name for pool in self.running.values() if self.state == "sampling" and not pool.alive]
        return Progress(
            state=f"{WAITS} of pool {empty[0]}" if empty else self.state,
            seconds=time.monotonic() - self.began,
            ready=self.ready,
            first_block=self.first_block,
            samples=self.samples,
            blocks=self.blocks,
            calls=dict(self.calls),
            devices=self.devices,
            pools=tuple(pool.progress() for pool in self.running.values()),
            queued=self.todo.qsize(),
            writers=(self.writers.progress(),),
            written=dict(self.written),
        )

    async def _start_pools(self) -> None:
        self.state = f"waiting for {self.devices} devices"
        await self.group.ready()
        self.state = "loading levels"
        for index, seats in enumerate(self.seats):
            if seats:
                slots = SLOTS if index else self.depth
                self.running[index] = Pool(self.names[index], seats, slots, self._creator(index))
        await asyncio.gather(*(pool.start() for pool in (*self.running.values(), self.writers)))
        self.batchers = {index: Batcher(pool, self.coalesce) for index, pool in self.running.items() if index}
        self.state = "sampling"
        self.ready = time.monotonic() - self.began

    def _creator(self, index: int) -> Any:
        job = replace(self.job, device=self.kinds[index].type)
        stage = next((name for name, number in self.stage_pools.items() if number == index), None)
        scores = stage == SCORE
        kind = ray.remote(ScoreActor if scores else StageActor if stage else LevelActor if index else TrajectoryActor)
        arguments: tuple[Any, ...] = (job, stage) if stage else (job, self.pools, index, self.stages)
        if scores:
            arguments = (job,)
        cuda = job.device == "cuda"

        def create(seat: Seat) -> Any:
            return kind.options(
                num_cpus=0 if cuda else seat.share,
                num_gpus=seat.share if cuda else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=seat.device
                ),
            ).remote(*arguments)

        return create

    async def _runner(self) -> None:
        while item := await self.todo.get():
            shard, block = item
            parts, calls = await self._block(block)
            self.calls += calls
            await self._finished(shard, block, parts)
        # Put the end mark back for the next runner.
        self.todo.put_nowait(None)

    async def _block(self, block: int) -> tuple[Parts, Counter[int]]:
        """Run a block, and return its parts and its calls by level; if its worker dies, start again on another."""
        tries = self.running[0].tries
        for _ in range(tries):
            try:
                condition = await self._stage("encode", block)
                finished, calls = await self._trajectory(block, condition)
                images, *_ = await self._stage("decode", block, finished) or [finished]
                return [images, *await self._stage(SCORE, block, images)], calls
            except DEATHS:
                pass
            except (ObjectLostError, RayTaskError) as error:
                if not lost(error):
                    raise
            self.running[0].metrics.count("retries")
        raise PoolError(f"block {block}: its worker died {tries} times in turn")

    async def _stage(self, stage: str, block: int, *given: ray.ObjectRef[Any]) -> list[ray.ObjectRef[Any]]:
        """The result of a stage for a block, by the stage's pool; empty if it has none."""
        if stage not in self.stage_pools:
            return []
        _, payloads = await self.running[self.stage_pools[stage]].call(stage, block, *given)
        return payloads

    async def _trajectory(
        self, block: int, condition: Sequence[ray.ObjectRef[Any]]
    ) -> tuple[ray.ObjectRef[Any], Counter[int]]:
        """Run a block on an actor that holds its state, and return its end and its calls by level."""
        async with self.running[0].member() as member:
            self.in_flight += 1
            try:
                return await self._segments(block, member, condition)
            except (ObjectLostError, RayTaskError) as error:
                if lost(error) and member.actor is not None:
                    member.actor.drop.remote(block)
                raise
            finally:
                self.in_flight -= 1
                self._flush_if_stuck()

    async def _segments(
        self, block: int, member: Member, condition: Sequence[ray.ObjectRef[Any]]
    ) -> tuple[ray.ObjectRef[Any], Counter[int]]:
        home, actor = self.running[0], member.actor
        calls: Counter[int] = Counter()
        segment: SegmentEnd
        segment, (payload,) = await home.call_member(member, "start", block, *condition)
        calls.update(segment.work.calls)
        while segment.asks:
            answers = await self._answers(block, segment.asks, payload, condition)
            for ask in segment.asks:
                calls.update(ask.calls)
            if member.actor is not actor:
                raise ActorUnavailableError("the actor that held the block's state has been replaced", None)
            segment, (payload,) = await home.call_member(member, "resume", block, *answers)
            calls.update(segment.work.calls)
        return payload, calls

    async def _answers(
        self, block: int, asks: Sequence[Ask], state: ray.ObjectRef[Any], condition: Sequence[ray.ObjectRef[Any]]
    ) -> list[ray.ObjectRef[Any]]:
        self.waiting += 1
        try:
            answers = [self.batchers[ask.pool].add(block, ask, state, condition) for ask in asks]
            self._flush_if_stuck()
            return await asyncio.gather(*answers)
        finally:
            self.waiting -= 1

    def _flush_if_stuck(self) -> None:
        """Flush the batchers if every block waits for another pool, as no more asks will come."""
        if self.waiting == self.in_flight:
            for batcher in self.batchers.values():
                batcher.flush()

    async def _finished(self, shard: int, block: int, parts: Parts) -> None:
        if self.first_block is None:
            self.first_block = time.monotonic() - self.began
        self.samples += self.job.rows_of(shard, block)
        self.blocks += 1
        made = self.made.setdefault(shard, {})
        made[block] = parts
        blocks = self.job.shard_blocks(shard)
        if len(made) == len(blocks):
            del self.made[shard]
            if self.ending:
                return
            writing = asyncio.ensure_future(self._write(shard, [made[b] for b in blocks]))
            self.writing.add(writing)
            writing.add_done_callback(self.writing.discard)
            self.written.append((shard, await writing))

    async def end_writes(self) -> None:
        """End the shards that are being written, and write no others."""
        self.ending = True
        await asyncio.gather(*self.writing, return_exceptions=True)

    async def _write(self, shard: int, blocks: Sequence[Parts]) -> int:
        """The rows of a shard that is written; if images are lost with their node, its blocks are made again."""
        for _ in range(TRIES):
            try:
                _, [written] = await self.writers.call("write", shard, *chain(*zip(*blocks, strict=True)))
                return int((await written).rows)
            except (ObjectLostError, RayTaskError) as error:
                if not lost(error):
                    raise
            logger.warning("images of shard %d are lost with their node, making it again", shard)
            # The calls of these blocks are counted already.
            blocks = [parts for parts, _ in await asyncio.gather(*map(self._block, self.job.shard_blocks(shard)))]
        raise PoolError(f"shard {shard}: images of it were lost {TRIES} times in turn")
