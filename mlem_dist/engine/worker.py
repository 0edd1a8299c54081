"""The workers inside the actors: they evaluate levels for other pools, or hold the states of blocks and run them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.engine.blocks import Blocks
from mlem_dist.engine.job import Job
from mlem_dist.engine.program import Ask, Program, SegmentEnd, evaluations, levels_of, program_of
from mlem_dist.engine.progress import Work
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.graphs import as_run
from mlem_dist.models.imports import import_diffusers
from mlem_dist.models.memory import keep_memory
from mlem_dist.solver.condition import Condition, join, take
from mlem_dist.solver.integrate import Drift, Known, Request, evaluate
from mlem_dist.solver.plan import Increment


class Levels(dict[int, Drift]):
    """A ladder's levels by number, loaded at first use, with counted calls. On a GPU, only one thread may use them."""

    def __init__(self, ladder: Ladder, device: str, precision: str) -> None:
        super().__init__()
        self.calls: Counter[int] = Counter()
        self._ladder, self._device, self._precision = ladder, device, precision
        self._lock = threading.Lock()

    def __missing__(self, number: int) -> Drift:
        self.load(number)
        return self[number]

    def load(self, number: int) -> None:
        """Load a level unless it is loaded already."""
        with self._lock:
            if number not in self:
                if self._ladder.levels[number - 1].kind != "gaussian":
                    import_diffusers()
                level = self._ladder.load_level(number, self._device, self._precision)
                self[number] = self._counted(number, as_run(level, self._device))

    def _counted(self, number: int, module: nn.Module) -> Drift:
        def call(x: Tensor, t: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
            with self._lock:
                self.calls[number] += 1
            out: Tensor = module(x, t, condition, {} if known is None else known)
            return out

        return call


class LevelWorker:
    """Evaluates the increments of one pool for any block: stateless, so that a call can be repeated anywhere."""

    def __init__(self, job: Job, pools: Sequence[range], pool: int) -> None:
        keep_memory()
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        self.job, self.pools, self.pool = job, pools, pool

    @torch.inference_mode()
    def prepare(self) -> None:
        """Load the levels that this pool evaluates, and run each once to warm up.

        Raises:
            UsageError: if the ladder is missing here, or if it or a library version differs from that of the job.
        """
        # Not in the constructor: Ray takes an error there for the actor's death.
        self.blocks = Blocks(self.job, Ladder.read(self.job.ladder))
        self.levels = Levels(self.blocks.ladder, self.job.device, self.job.precision)
        # A GPU warms up for each batch size. A CPU does not, and would take a second for a whole block.
        size = self.blocks.job.block_size if self.blocks.job.device == "cuda" else 1
        x = torch.zeros(size, *self.blocks.ladder.sample_shape, device=self.blocks.job.device)
        condition = take(self.blocks.condition(0), slice(size))
        t = torch.ones(len(x), device=x.device)
        own = [Increment(number, 0) for number in levels_of(evaluations(self.job.workload), self.pools)[self.pool]]
        evaluate(self.levels, own, x, t, condition)

    @torch.inference_mode()
    def evaluate(self, asks: Sequence[tuple[int, Ask]], *states: np.ndarray) -> tuple[Work | np.ndarray, ...]:
        """Evaluate the increments that blocks ask for, with one evaluation of each level for all blocks.

        Args:
            asks: (block, ask), all for the same increments.
            states: the state of each block, float32 (B, C, H, W).

        Returns:
            The work, and for each block its increments, stacked: float32 (increments, B, C, H, W).
        """
        clock = self._clock()
        x = torch.cat([torch.tensor(state, device=self.blocks.job.device) for state in states])
        times = [float(self.blocks.table.t[ask.step]) for _, ask in asks]
        t = torch.cat([torch.full((len(state),), time) for time, state in zip(times, states, strict=True)])
        condition = join([self.blocks.condition(block) for block, _ in asks])
        values = torch.stack(evaluate(self.levels, asks[0][1].increments, x, t.to(x.device), condition)).cpu()
        # Each answer gets contiguous memory, as it is sent on its own; the answer to a single block has it already.
        answers = [np.ascontiguousarray(value) for value in values.split([len(state) for state in states], dim=1)]
        work = clock(*states, *answers)
        samples, calls = work.samples * len(asks), {k: count * len(asks) for k, count in work.calls.items()}
        return replace(work, samples=samples, calls=calls), *answers

    def _clock(self) -> Any:
        """A function that returns the work since now, given the arrays received and returned."""
        cuda = self.blocks.job.device == "cuda"
        # On CPUs actors share the cores, so only CPU seconds say which actor used them.
        now = time.perf_counter if cuda else time.process_time
        start, calls = now(), self.levels.calls.copy()

        def work(*arrays: np.ndarray) -> Work:
            if cuda:
                torch.cuda.synchronize()
            samples, moved = self.blocks.job.block_size, sum(array.nbytes for array in arrays)
            return Work(now() - start, dict(self.levels.calls - calls), samples, moved)

        return work


@dataclass(frozen=True)
class Running:
    """A block in flight: its trajectory, its program, and its pending request, which is None before the first one."""

    trajectory: Generator[Request, list[Tensor], Tensor]
    program: Program
    request: Request | None = None


class TrajectoryWorker(LevelWorker):
    """Holds the states of blocks and runs their segments, which need no other pool."""

    def __init__(self, job: Job, pools: Sequence[range], pool: int) -> None:
        super().__init__(job, pools, pool)
        self.running: dict[int, Running] = {}

    @torch.inference_mode()
    def start(self, block: int) -> tuple[SegmentEnd, np.ndarray]:
        """Begin a block, again if it was begun before, and run its first segment; returns as `resume` does."""
        clock = self._clock()
        plan = self.job.block_plan(block)
        running = Running(self.blocks.trajectory(block, plan), program_of(plan, tuple(self.pools)))
        return self._run(block, running, None, clock)

    @torch.inference_mode()
    def resume(self, block: int, *answers: np.ndarray) -> tuple[SegmentEnd, np.ndarray]:
        """Continue a block with the answers to the last segment's asks, in the order of the asks.

        Returns:
            The end of the segment, and the state x, float32 (B, C, H, W), if the segment has asks; otherwise the
            finished images, uint8 (B, H, W, C).
        """
        clock = self._clock()
        return self._run(block, self.running.pop(block), answers, clock)

    def drop(self, block: int) -> None:
        """Forget a block that begins again elsewhere."""
        self.running.pop(block, None)

    def _run(
        self,
        block: int,
        running: Running,
        answers: Sequence[np.ndarray] | None,
        clock: Any,
    ) -> tuple[SegmentEnd, np.ndarray]:
        condition = self.blocks.condition(block)
        received = answers or ()
        try:
            request = running.request or next(running.trajectory)
            while True:
                turn = running.program.by_step[request.step]
                if turn.asks and answers is None:
                    self.running[block] = replace(running, request=request)
                    x = request.x.cpu().numpy()
                    return SegmentEnd(clock(x, *received), turn.asks), x
                own = evaluate(self.levels, turn.own, request.x, request.t, condition)
                values = dict(zip(turn.own, own, strict=True))
                for ask, answer in zip(turn.asks, answers or (), strict=True):
                    values |= zip(ask.increments, torch.tensor(answer, device=request.x.device), strict=True)
                answers = None
                request = running.trajectory.send([_increment(values, term.increment) for term in request.terms])
        except StopIteration as end:
            images = self.blocks.images(block, end.value)
            return SegmentEnd(clock(images, *received), ()), images


def _increment(values: Mapping[Increment, Tensor], wanted: Increment) -> Tensor:
    """The value of an evaluated increment, or the difference of its two evaluated levels."""
    if wanted in values:
        return values[wanted]
    return values[Increment(wanted.level, 0)] - values[Increment(wanted.below, 0)]
