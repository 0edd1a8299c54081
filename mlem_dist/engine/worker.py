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
from mlem_dist.solver.condition import Condition, join
from mlem_dist.solver.integrate import Drift, Known, Request, evaluate
from mlem_dist.solver.plan import Increment

Arrays = Mapping[str, np.ndarray]
"""A condition as arrays, which move between processes."""


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
                    import_diffusers(any(level.quantised_bytes for level in self._ladder.levels))
                level = self._ladder.load_level(number, self._device, self._precision)
                self[number] = self._counted(number, as_run(level, self._device))

    def _counted(self, number: int, module: nn.Module) -> Drift:
        def call(x: Tensor, t: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
            with self._lock:
                self.calls[number] += 1
            out: Tensor = module(x, t, condition, {} if known is None else known)
            return out

        return call


class Worker:
    """The computation of blocks in a process of its own, with one thread."""

    def __init__(self, job: Job) -> None:
        keep_memory()
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        self.job = job

    def prepare(self) -> None:
        """Find the ladder.

        Raises:
            UsageError: if the ladder is missing here, or if it or a library version differs from that of the job.
        """
        # Not in the constructor: Ray takes an error there for the actor's death.
        self.blocks = Blocks(self.job, Ladder.read(self.job.ladder))

    def _clock(self) -> Any:
        """A function that returns the work since now, given the arrays received and returned."""
        cuda = self.job.device == "cuda"
        # On CPUs actors share the cores, so only CPU seconds say which actor used them.
        now = time.perf_counter if cuda else time.process_time
        start, calls = now(), self._calls()

        def work(*arrays: np.ndarray) -> Work:
            if cuda:
                torch.cuda.synchronize()
            samples, moved = self.job.block_size, sum(array.nbytes for array in arrays)
            return Work(now() - start, dict(self._calls() - calls), samples, moved)

        return work

    def _calls(self) -> Counter[int]:
        """The number of evaluations of each level so far."""
        return Counter()


class StageWorker(Worker):
    """Encodes the prompts of blocks, or decodes their latents: stateless, as `LevelWorker`.

    Args:
        job: the job.
        stage: one of `STAGES`.
    """

    def __init__(self, job: Job, stage: str) -> None:
        super().__init__(job)
        self.stage = stage

    def prepare(self) -> None:
        """Load the encoder or the decoder.

        Raises:
            UsageError: as for `Worker.prepare`, or if it cannot be loaded.
        """
        super().prepare()
        _ = self.blocks.encoder if self.stage == "encode" else self.blocks.decoder

    @torch.inference_mode()
    def encode(self, block: int) -> tuple[Work, Arrays]:
        """The work, and the condition of a block as arrays by name."""
        clock = self._clock()
        arrays = {name: _array(value) for name, value in self.blocks.condition(block).items()}
        return clock(*arrays.values()), arrays

    @torch.inference_mode()
    def decode(self, block: int, latents: np.ndarray) -> tuple[Work, np.ndarray]:
        """The work, and the images of a finished block, uint8 (B, H, W, C)."""
        clock = self._clock()
        images = self.blocks.images(block, torch.tensor(latents, device=self.job.device))
        return clock(latents, images), images


class LevelWorker(Worker):
    """Evaluates the increments of one pool for any block: stateless, so that a call can be repeated anywhere.

    Args:
        job: the job.
        pools: the levels (from 1) of each pool.
        pool: number of the worker's pool.
        stages: the stages that have pools of their own.
    """

    def __init__(self, job: Job, pools: Sequence[range], pool: int, stages: Sequence[str] = ()) -> None:
        super().__init__(job)
        self.pools, self.pool, self.stages = pools, pool, stages

    @torch.inference_mode()
    def prepare(self) -> None:
        """Load the levels that this pool evaluates, and run each once to warm up.

        Raises:
            UsageError: as for `Worker.prepare`.
        """
        super().prepare()
        self.levels = Levels(self.blocks.ladder, self.job.device, self.job.precision)
        # A GPU warms up for each batch size. A CPU does not, and would take a second for a whole block.
        size = self.blocks.job.block_size if self.blocks.job.device == "cuda" else 1
        x = torch.zeros(size, *self.blocks.ladder.sample_shape, device=self.blocks.job.device)
        condition = self.blocks.ladder.condition(torch.arange(size, device=x.device))
        t = torch.ones(len(x), device=x.device)
        own = [Increment(number, 0) for number in levels_of(evaluations(self.job.workload), self.pools)[self.pool]]
        evaluate(self.levels, own, x, t, condition)

    @torch.inference_mode()
    def evaluate(self, asks: Sequence[tuple[int, Ask]], *given: Any) -> tuple[Work | np.ndarray, ...]:
        """Evaluate the increments that blocks ask for, with one evaluation of each level for all blocks.

        Args:
            asks: (block, ask), all for the same increments.
            given: the state of each block, float32 (B, C, H, W), then the condition of each block as `encode` returns
                it, if prompts are encoded in a pool of their own.

        Returns:
            The work, and for each block its increments, stacked: float32 (increments, B, C, H, W).
        """
        clock = self._clock()
        states, conditions = given[: len(asks)], given[len(asks) :]
        x = torch.cat([torch.tensor(state, device=self.blocks.job.device) for state in states])
        times = [float(self.blocks.table.t[ask.step]) for _, ask in asks]
        t = torch.cat([torch.full((len(state),), time) for time, state in zip(times, states, strict=True)])
        each = conditions or [None] * len(asks)
        condition = join([self._condition(block, arrays) for (block, _), arrays in zip(asks, each, strict=True)])
        values = torch.stack(evaluate(self.levels, asks[0][1].increments, x, t.to(x.device), condition)).cpu()
        # Each answer gets contiguous memory, as it is sent on its own; the answer to a single block has it already.
        answers = [np.ascontiguousarray(value) for value in values.split([len(state) for state in states], dim=1)]
        work = clock(*states, *answers)
        samples, calls = work.samples * len(asks), {k: count * len(asks) for k, count in work.calls.items()}
        return replace(work, samples=samples, calls=calls), *answers

    def _condition(self, block: int, arrays: Arrays | None) -> Condition:
        """The condition of a block, on the worker's device: given as arrays, or made here."""
        if arrays is None:
            return self.blocks.condition(block)
        return {name: torch.tensor(array, device=self.job.device) for name, array in arrays.items()}

    def _calls(self) -> Counter[int]:
        return self.levels.calls.copy()


@dataclass(frozen=True)
class Running:
    """A block in flight: its trajectory, program and condition, and its pending request, None before the first one."""

    trajectory: Generator[Request, list[Tensor], Tensor]
    program: Program
    condition: Condition
    request: Request | None = None


class TrajectoryWorker(LevelWorker):
    """Holds the states of blocks and runs their segments, which need no other pool."""

    def __init__(self, job: Job, pools: Sequence[range], pool: int, stages: Sequence[str] = ()) -> None:
        super().__init__(job, pools, pool, stages)
        self.running: dict[int, Running] = {}

    @torch.inference_mode()
    def prepare(self) -> None:
        """As `LevelWorker.prepare`; also load the encoder and the decoder, unless they have pools of their own.

        Raises:
            UsageError: as for `StageWorker.prepare`.
        """
        super().prepare()
        # Both have pools of their own, or none.
        if "decode" not in self.stages:
            _ = self.blocks.encoder, self.blocks.decoder

    @torch.inference_mode()
    def start(self, block: int, condition: Arrays | None = None) -> tuple[SegmentEnd, np.ndarray]:
        """Begin a block, again if it was begun before, and run its first segment; returns as `resume` does.

        `condition` is as `StageWorker.encode` returns it; None if it is made here.
        """
        clock = self._clock()
        plan = self.job.block_plan(block)
        program = program_of(plan, tuple(self.pools))
        known = self._condition(block, condition)
        running = Running(self.blocks.trajectory(block, plan, known), program, known)
        return self._run(block, running, None, clock)

    @torch.inference_mode()
    def resume(self, block: int, *answers: np.ndarray) -> tuple[SegmentEnd, np.ndarray]:
        """Continue a block with the answers to the last segment's asks, in the order of the asks.

        Returns:
            The end of the segment, and the state x, float32 (B, C, H, W), if the segment has asks. Otherwise the
            finished images, uint8 (B, H, W, C), or latents, float32 (B, C, H, W), if these are decoded elsewhere.
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
        received = answers or ()
        try:
            request = running.request or next(running.trajectory)
            while True:
                turn = running.program.by_step[request.step]
                if turn.asks and answers is None:
                    self.running[block] = replace(running, request=request)
                    x = request.x.cpu().numpy()
                    return SegmentEnd(clock(x, *received), turn.asks), x
                own = evaluate(self.levels, turn.own, request.x, request.t, running.condition)
                values = dict(zip(turn.own, own, strict=True))
                for ask, answer in zip(turn.asks, answers or (), strict=True):
                    values |= zip(ask.increments, torch.tensor(answer, device=request.x.device), strict=True)
                answers = None
                request = running.trajectory.send([_increment(values, term.increment) for term in request.terms])
        except StopIteration as end:
            decoded = "decode" not in self.stages
            finished = self.blocks.images(block, end.value) if decoded else end.value.cpu().numpy()
            return SegmentEnd(clock(finished, *received), ()), finished


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, which knows no bfloat16."""
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: np.ndarray = wide.cpu().numpy()
    return array


def _increment(values: Mapping[Increment, Tensor], wanted: Increment) -> Tensor:
    """The value of an evaluated increment, or the difference of its two evaluated levels."""
    if wanted in values:
        return values[wanted]
    return values[Increment(wanted.level, 0)] - values[Increment(wanted.below, 0)]
