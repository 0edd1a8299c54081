"""What runs inside the actors: levels evaluated for others, and trajectories that hold the state of blocks."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.ladder.graphs import as_run
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import seconds_per_sample
from mlem_dist.ladder.memory import keep_memory
from mlem_dist.runtime.blocks import Blocks
from mlem_dist.runtime.imports import import_diffusers
from mlem_dist.runtime.job import Job
from mlem_dist.runtime.placement import divide, evaluations, levels_of
from mlem_dist.runtime.progress import Work
from mlem_dist.runtime.segments import Ask, SegmentEnd
from mlem_dist.solver.integrate import Drift, Request, evaluate
from mlem_dist.solver.plan import Increment


class Levels(dict[int, Drift]):
    """A ladder's levels by number, loaded at first use, their calls counted; for several threads, or one on a GPU."""

    def __init__(self, ladder: Ladder, device: str, precision: str) -> None:
        super().__init__()
        self.calls: Counter[int] = Counter()
        self._ladder, self._device, self._precision = ladder, device, precision
        self._lock = threading.Lock()

    def __missing__(self, number: int) -> Drift:
        self.load(number)
        return self[number]

    def load(self, number: int) -> None:
        """Load a level unless it is loaded."""
        with self._lock:
            if number not in self:
                if self._ladder.levels[number - 1].kind == "unet":
                    import_diffusers()
                level = self._ladder.load_level(number, self._device, self._precision)
                self[number] = self._counted(number, as_run(level, self._device))

    def _counted(self, number: int, module: nn.Module) -> Drift:
        def call(x: Tensor, t: Tensor, label: Tensor, *base: Tensor) -> Tensor:
            with self._lock:
                self.calls[number] += 1
            out: Tensor = module(x, t, label, *base)
            return out

        return call


def time_levels(job: Job, numbers: Sequence[int]) -> list[float]:
    """Seconds per sample of levels by number, in blocks of the job, as a worker in this process evaluates them.

    One after the other: there may not be memory for all. NaN for a level that there is no memory for.
    """
    ladder = Ladder.read(job.ladder)
    about = ladder.sample_shape, len(ladder.labels), job.device, job.block_size
    found = []
    for k in numbers:
        try:
            level = Levels(ladder, job.device, job.precision)[k]
            found.append(seconds_per_sample(level, *about, warm=1, repeats=1))
        except torch.OutOfMemoryError:
            found.append(math.nan)
    return found


class LevelWorker:
    """Evaluates the increments of one pool for any block: stateless, so that a call can be repeated anywhere."""

    def __init__(self, job: Job, pools: Sequence[range], pool: int) -> None:
        keep_memory()
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        self.job, self.pools, self.pool = job, pools, pool

    @torch.inference_mode()
    def prepare(self) -> None:
        """Load the levels that this pool evaluates, and run each once, so that the first call is a warm one.

        Raises:
            UsageError: the ladder is not here, or another one.
        """
        # Not in the constructor, an error of which Ray takes for the actor's death.
        self.blocks = Blocks(self.job, Ladder.read(self.job.ladder))
        self.levels = Levels(self.blocks.ladder, self.job.device, self.job.precision)
        # A GPU prepares itself for a batch's size. A CPU does not, and a whole block would take it a second.
        size = self.blocks.job.block_size if self.blocks.job.device == "cuda" else 1
        x = torch.zeros(size, *self.blocks.ladder.sample_shape, device=self.blocks.job.device)
        label = self.blocks.label(0)[:size]
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        own = [Increment(number, 0) for number in levels_of(evaluations(self.job), self.pools)[self.pool]]
        evaluate(self.levels, own, x, t, label)

    @torch.inference_mode()
    def evaluate(self, asks: Sequence[tuple[int, Ask]], *states: np.ndarray) -> tuple[Work | np.ndarray, ...]:
        """The increments that blocks ask for, all for the same ones, in one evaluation of each level.

        Args:
            asks: block and ask.
            states: of each, float32 (B, C, H, W).

        Returns:
            The work, and for each block its increments, stacked: float32 (increments, B, C, H, W).
        """
        clock = self._clock()
        x = torch.cat([torch.tensor(state, device=self.blocks.job.device) for state in states])
        t = torch.cat([torch.full((len(state),), ask.t) for (_, ask), state in zip(asks, states, strict=True)])
        label = torch.cat([self.blocks.label(block) for block, _ in asks])
        values = torch.stack(evaluate(self.levels, asks[0][1].increments, x, t.to(x.device), label)).cpu()
        # Each in memory of its own, to be sent on its own; that of one block alone is.
        found = [np.ascontiguousarray(value) for value in values.split([len(state) for state in states], dim=1)]
        work = clock(*states, *found)
        samples, calls = work.samples * len(asks), {k: count * len(asks) for k, count in work.calls.items()}
        return replace(work, samples=samples, calls=calls), *found

    def _clock(self) -> Any:
        """A function that returns the work since now, given the arrays that came and go."""
        cuda = self.blocks.job.device == "cuda"
        # On a CPU the seats of a device share its cores, so that only CPU seconds say who used it.
        now = time.perf_counter if cuda else time.process_time
        start, calls = now(), self.levels.calls.copy()

        def work(*arrays: np.ndarray) -> Work:
            if cuda:
                torch.cuda.synchronize()
            samples, moved = self.blocks.job.block_size, sum(array.nbytes for array in arrays)
            return Work(now() - start, dict(self.levels.calls - calls), samples, moved)

        return work


class TrajectoryWorker(LevelWorker):
    """Holds the state of blocks and runs every segment that needs no other pool."""

    def __init__(self, job: Job, pools: Sequence[range], pool: int) -> None:
        super().__init__(job, pools, pool)
        self.running: dict[int, tuple[Generator[Request, list[Tensor], Tensor], Request]] = {}

    @torch.inference_mode()
    def start(self, block: int) -> tuple[SegmentEnd, np.ndarray]:
        """Begin a block, afresh if it was begun before, and run its first segment; returns as `resume` does."""
        clock = self._clock()
        return self._run(block, self.blocks.trajectory(block), None, None, clock)

    @torch.inference_mode()
    def resume(self, block: int, *answers: np.ndarray) -> tuple[SegmentEnd, np.ndarray]:
        """Go on with the answers to the last segment's asks, in their order.

        Returns:
            The segment, and the state x (B, C, H, W) float32 where it asks for values, or the finished images
            (B, H, W, C) uint8 where it does not.
        """
        clock = self._clock()
        run, request = self.running.pop(block)
        return self._run(block, run, request, answers, clock)

    def drop(self, block: int) -> None:
        """Forget a block that is begun again elsewhere."""
        self.running.pop(block, None)

    def _run(
        self,
        block: int,
        run: Generator[Request, list[Tensor], Tensor],
        request: Request | None,
        answers: Sequence[np.ndarray] | None,
        clock: Any,
    ) -> tuple[SegmentEnd, np.ndarray]:
        label = self.blocks.label(block)
        received = answers or ()
        try:
            request = request or next(run)
            while True:
                own, *others = divide(tuple(term.increment for term in request.terms), self.pools)
                asks = tuple(Ask(pool, request.t, part) for pool, part in enumerate(others, 1) if part)
                if asks and answers is None:
                    self.running[block] = run, request
                    x = request.x.cpu().numpy()
                    return SegmentEnd(clock(x, *received), asks), x
                found = dict(zip(own, evaluate(self.levels, own, request.x, request.t, label), strict=True))
                for ask, answer in zip(asks, answers or (), strict=True):
                    found |= zip(ask.increments, torch.tensor(answer, device=request.x.device), strict=True)
                answers = None
                request = run.send([_increment(found, term.increment) for term in request.terms])
        except StopIteration as end:
            images = self.blocks.images(block, end.value)
            return SegmentEnd(clock(images, *received), ()), images


def _increment(found: Mapping[Increment, Tensor], wanted: Increment) -> Tensor:
    """One that has been evaluated, or the difference of two levels that have."""
    if wanted in found:
        return found[wanted]
    return found[Increment(wanted.level, 0)] - found[Increment(wanted.below, 0)]
