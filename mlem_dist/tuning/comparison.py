"""Plans compared: the same initial noise and Brownian path for all, against the best level at many steps."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.graphs import as_run
from mlem_dist.models.memory import keep_memory
from mlem_dist.models.weights import save_tensors
from mlem_dist.solver.closed_form import ClosedForm
from mlem_dist.solver.integrate import Drift, Noise, block_noise, coarse_noise, integrate
from mlem_dist.solver.plan import Plan, Recipe, block_rng, single_level
from mlem_dist.solver.steps import StepTable, solver_table
from mlem_dist.tuning.tell import Tell

BLOCK = {"cpu": 32, "cuda": 128}
"""Samples that advance together, by device type, if there are so many; those of a block share a drawn plan."""


@dataclass(frozen=True)
class Verdict:
    """The cost of a plan and its distance from the reference.

    Attributes:
        seconds: per sample, measured on one block, and scaled by the ladder's costs from its plan to the mean of all.
        errors: mean squared error per value of each sample, float64 (n,).
    """

    seconds: float
    errors: np.ndarray


class Judge:
    """`samples` trajectories of a ladder with one solver, in blocks of 32 or on a GPU 128, with classes in turn.

    Args:
        ladder: the ladder.
        solver: "ddpm" or "ddim".
        device: "cpu" or "cuda".
        steps: of the reference; for the SDE, those of a plan are a divisor of it.
        samples: how many, a multiple of the block unless they are fewer.
        seed: of the noises and coins; plans are chosen with one seed and judged with another.
        cache: where the reference is kept, or None to compute it each time.
        threads: blocks that advance at a time, each on one thread; on a GPU one.

    Attributes:
        block: samples of a block.
        levels: every level by number, as a module that has derivatives.
    """

    def __init__(
        self,
        ladder: Ladder,
        solver: str,
        device: str,
        steps: int,
        samples: int,
        seed: int,
        cache: Path | None = None,
        threads: int = 1,
    ) -> None:
        self.block = min(samples, BLOCK[device])
        assert samples % self.block == 0
        keep_memory()
        # Within a block one thread: it is timed so, and sums over several would be rounded in another order.
        torch.set_num_threads(1)
        self.threads = threads if device == "cpu" else 1
        self.ladder, self.solver, self.device = ladder, solver, device
        self.samples, self.seed, self.cache = samples, seed, cache
        self._warm = False
        self.use({k: ladder.load_level(k, device) for k in range(1, len(ladder.levels) + 1)})
        self.fine = solver_table(ladder.alpha_bar, steps, solver)

    def use(self, levels: dict[int, nn.Module]) -> None:
        """Run these instead of the ladder's levels; a reference that is known already stays as it is."""
        self.levels = levels
        self._run: dict[int, Drift] = {k: as_run(level, self.device) for k, level in levels.items()}

    def label(self, block: int) -> Tensor:
        """int64 (B,): the classes of a block, the same ones in all blocks if there are at most B of them."""
        classes = max(1, len(self.ladder.labels))
        first = block * self.block if classes > self.block else 0
        return torch.arange(first, first + self.block, device=self.device) % classes

    def noise(self, block: int, steps: int) -> Noise:
        """The noise of a block for `steps` steps, one Brownian path for all; for the SDE a divisor of `self.fine`."""
        fine = block_noise(self.seed, block, (self.block, *self.ladder.sample_shape), self.device)
        return coarse_noise(fine, self.fine, len(self.fine) // steps)

    @cached_property
    def reference(self) -> Tensor:
        """float32 (samples, C, H, W): the best level at every step."""
        # One that was kept by a version that drew other noise is not that of the paths here.
        noise = hashlib.sha256(self.noise(0, len(self.fine))(-1).cpu().numpy().tobytes()).hexdigest()[:8]
        identity = self.ladder.digest[:12], self.solver, len(self.fine), self.seed, noise, self.samples, self.device
        name = f"{'-'.join(map(str, identity))}.safetensors"
        if self.cache and (self.cache / name).exists():
            return load_file(self.cache / name, device=self.device)["reference"]
        best = single_level(len(self.levels), len(self.levels), len(self.fine))
        ends = self._ends(lambda block: self.end(best, block))
        if self.cache:
            save_tensors(self.cache / name, {"reference": ends.cpu()})
        return ends

    def judge(self, plan: Plan | Recipe) -> Verdict:
        """The verdict on a memorised plan, or on a recipe by which each block draws its own."""
        plans = self._plans(plan)
        plain = block_noise(self.seed, 0, (self.block, *self.ladder.sample_shape), self.device)
        label = self.label(0)
        table, closed_form = self._grid(plans[0], label, path=False)
        seconds = self.timed(lambda: integrate(self._run, table, plans[0], plain, label, closed_form))
        # Draws differ in cost, those of independent coins by a third and more: the time is of the mean of them.
        cost = self.ladder.cost(self.device)
        seconds *= float(np.mean([plan.nfe(cost) for plan in plans])) / plans[0].nfe(cost)
        return self.verdict(seconds, lambda block: self.end(plans[block], block))

    def errors(self, plans: Sequence[Plan | Recipe], progress: Tell = lambda done, total: None) -> np.ndarray:
        """The errors of the verdicts on several plans or recipes, float64 (plans, n), without timing them.

        `progress` is called with the number of plans done, and the number of all.
        """
        blocks = self.samples // self.block
        jobs = [(drawn, block) for plan in plans for block, drawn in enumerate(self._plans(plan))]
        errors = []
        references = self.reference.split(self.block)
        with ThreadPoolExecutor(self.threads) as pool:
            for done, end in enumerate(pool.map(lambda job: self.end(*job), jobs), 1):
                errors.append(_errors(end, references[(done - 1) % blocks]))
                progress(-(-done // blocks), len(plans))
        return np.concatenate(errors).reshape(len(plans), -1)

    def _plans(self, plan: Plan | Recipe) -> list[Plan]:
        blocks = range(self.samples // self.block)
        return [plan if isinstance(plan, Plan) else plan.plan(block_rng(self.seed, block)) for block in blocks]

    def verdict(self, seconds: float, end: Callable[[int], Tensor]) -> Verdict:
        """The verdict on any way to come from the noise of a block to its end (B, C, H, W)."""
        return Verdict(seconds, _errors(self._ends(end), self.reference))

    def timed(self, run: Callable[[], Tensor]) -> float:
        """Seconds per sample of a block's `run`: on a CPU one thread's own time, on a GPU the clock's."""
        clock = time.perf_counter if self.device == "cuda" else time.thread_time
        if self.device == "cuda" or not self._warm:
            # The first run also loads and chooses kernels, and asks for memory.
            run()
            self._warm = True
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / self.block

    def _ends(self, end: Callable[[int], Tensor]) -> Tensor:
        with ThreadPoolExecutor(self.threads) as pool:
            return torch.cat(list(pool.map(end, range(self.samples // self.block))))

    def end(self, plan: Plan, block: int) -> Tensor:
        """Where a plan brings a block, float32 (B, C, H, W), on the Brownian path of all plans."""
        label = self.label(block)
        table, closed_form = self._grid(plan, label, path=True)
        return integrate(self._run, table, plan, self.noise(block, len(table)), label, closed_form)

    def _grid(self, plan: Plan, label: Tensor, path: bool) -> tuple[StepTable, ClosedForm | None]:
        """A plan's step table and, if it collapses, a block's closed form, for single steps' noises with `path`."""
        table = solver_table(self.ladder.alpha_bar, plan.fire.shape[1], self.solver)
        if not plan.collapse:
            return table, None
        base = self.levels[1]
        assert isinstance(base, GaussianLevel)
        return table, ClosedForm(base.affine(table.t), table, label, path)


def _errors(end: Tensor, reference: Tensor) -> np.ndarray:
    errors: np.ndarray = (end - reference).square().flatten(1).double().mean(1).cpu().numpy()
    return errors
