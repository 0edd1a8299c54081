"""The in-process engine, the one-process reference: it makes the same files, block after block."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from threading import Lock
from typing import Any

import numpy as np
import torch

from mlem_dist.engine.blocks import Blocks
from mlem_dist.engine.job import Job
from mlem_dist.engine.program import evaluations, levels_of
from mlem_dist.engine.progress import PoolProgress, Progress
from mlem_dist.engine.scores import Scorer
from mlem_dist.engine.worker import Levels
from mlem_dist.engine.writer import Writer
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.memory import keep_memory
from mlem_dist.solver.integrate import integrate
from mlem_dist.store import Location


def block_maker(
    job: Job, ladder: Ladder, image_seed: Callable[[int], int] | None = None
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """A function that makes a block in this process; all levels that the job calls are loaded.

    The function returns the images, uint8 (B, H, W, C), and the number of evaluations of each level, int64 (K,).
    `image_seed` is as for `Blocks`.
    """
    keep_memory()
    # One thread within a block, as in the actors: sums over several threads would be rounded in another order.
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    blocks, levels = Blocks(job, ladder, image_seed), Levels(ladder, job.device, job.precision)

    def make(block: int) -> tuple[np.ndarray, np.ndarray]:
        plan, condition = job.block_plan(block), blocks.condition(block)
        closed_form = blocks.closed_form(block, condition)
        x = integrate(levels, blocks.table, plan, blocks.noise(block), condition, closed_form)
        return blocks.images(block, x), plan.calls.sum(1)

    for number in levels_of(evaluations(job.workload), [range(1, len(ladder.levels) + 1)])[0]:
        levels.load(number)
    # As levels: before threads need them.
    _ = blocks.encoder, blocks.decoder
    return make


def sample_blocks(job: Job, ladder: Ladder, image_seed: Callable[[int], int] | None = None) -> Iterator[np.ndarray]:
    """The images of each of a job's blocks in order, uint8 (B, H, W, C); `image_seed` is as for `Blocks`.

    Raises:
        NonFiniteError: if a block ends with NaN or infinite values.
    """
    make = block_maker(job, ladder, image_seed)
    for block in range(-(-job.num // job.block_size)):
        yield make(block)[0]


def run_inline(
    job: Job, ladder: Ladder, out: Location, shards: Sequence[int], devices: int, scorer: Scorer | None = None
) -> Generator[Progress]:
    """Make the given shards on `devices` CPU cores, a block on each, or on one GPU; yields a snapshot after each block.

    `scorer` scores images, if the job has scores.

    Raises:
        NonFiniteError: if a block ends with NaN or infinite values.
    """
    began, busy = time.monotonic(), time.process_time()
    writer = Writer(job, out, ladder.labels)
    writer.prepare()
    make, turn = block_maker(job, ladder), Lock()
    ready = time.monotonic() - began

    def scored(block: int) -> tuple[list[Any], np.ndarray]:
        made, calls = make(block)
        if scorer is None:
            return [made], calls
        with turn:
            return [made, scorer.columns(block, made)], calls

    first: float | None = None
    samples = done = 0
    calls = np.zeros(len(ladder.levels), dtype=np.int64)
    todo = iter([(shard, block) for shard in shards for block in job.shard_blocks(shard)])
    flying: deque[tuple[int, int, Future[tuple[list[Any], np.ndarray]]]] = deque()
    parts: list[list[Any]] = []
    pool = ThreadPoolExecutor(devices)
    try:
        while True:
            while len(flying) <= devices and (item := next(todo, None)):
                flying.append((*item, pool.submit(scored, item[1])))
            if not flying:
                return
            shard, block, future = flying.popleft()
            part, block_calls = future.result()
            parts.append(part)
            calls += block_calls
            first = first or time.monotonic() - began
            written = {}
            if block == job.shard_blocks(shard)[-1]:
                written[shard] = writer.write(shard, *chain(*zip(*parts, strict=True)))[1].rows
                parts = []
            seconds = time.monotonic() - began
            samples += job.rows_of(shard, block)
            done += 1
            used = time.process_time() - busy if job.device == "cpu" else seconds
            progress = PoolProgress("in process", devices, used, 0)
            by_level = dict(enumerate(calls.tolist(), 1))
            counts = samples, done, by_level, devices, (progress,)
            yield Progress("sampling", seconds, ready, first, *counts, written=written)
    finally:
        # Blocks that have not begun are of no use to a run that ends early.
        pool.shutdown(cancel_futures=True)
