"""Comparison of plans with the best level at many steps, all on the same initial noise and Brownian path."""

from __future__ import annotations

import hashlib
import json
import math
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
from mlem_dist.ladder.sizes import default_block
from mlem_dist.models.devices import device_memory
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.graphs import as_run
from mlem_dist.models.memory import keep_memory
from mlem_dist.models.weights import save_tensors
from mlem_dist.solver.closed_form import ClosedForm
from mlem_dist.solver.condition import Condition
from mlem_dist.solver.integrate import Drift, integrate
from mlem_dist.solver.noise import Noise, coarse_noise, image_noise
from mlem_dist.solver.plan import Plan, Recipe, block_rng, single_level
from mlem_dist.solver.steps import StepTable, solver_table
from mlem_dist.tuning.reporting import ReportProgress

BLOCK = {"cpu": 32, "cuda": 128}
"""Largest number of samples per block, by device type. All samples of a block share one drawn plan."""


SET_SIZE = 2**20
"""Number of image seeds that a set of noises for selection or tests has, at most."""


def set_seed(number: int) -> int:
    """First image seed of set `number` of noises, counted from the highest seeds, which datasets use last."""
    return 2**32 - (number + 1) * SET_SIZE


def block_size(ladder: Ladder, device: str, memory: float = math.inf) -> int:
    """Number of samples per block: a power of two, so that it divides the numbers of samples of all comparisons.

    `memory` is as for `default_block`. The number without it is a multiple of that with it.
    """
    return 2 ** int(math.log2(min(BLOCK[device], default_block(ladder, device, memory))))


@dataclass(frozen=True)
class Measurement:
    """Cost of a plan and its error against the reference.

    Attributes:
        seconds: seconds per sample, measured on one block. The ladder's costs scale the time from this block's plan to
            the mean over the plans of all blocks.
        errors: mean squared error per value of each sample, float64 (n,).
    """

    seconds: float
    errors: np.ndarray


class PlanComparison:
    """Error and time of plans on `samples` trajectories of a ladder with one solver.

    Blocks have 32 samples, or 128 on a GPU, and fewer of large samples or where the device's memory is small. The
    samples take the ladder's classes or prompts in turn.

    Args:
        ladder: the ladder.
        solver: "sde" or "ode".
        device: "cpu" or "cuda".
        steps: number of steps of the reference. For the SDE, the number of steps of a plan must divide it.
        samples: number of samples: a multiple of the block size, or fewer than one block.
        seed: seed of the noises and coins; plans are chosen with one seed and tested with another.
        cache: folder that keeps the reference, or None to compute it each time.
        threads: number of blocks that advance at a time, each on one thread; always 1 on a GPU.

    Attributes:
        block: number of samples per block.
        levels: every level by number, as a module that supports derivatives.
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
        self.block = min(samples, block_size(ladder, device, device_memory(device)))
        assert samples % self.block == 0
        keep_memory()
        # One thread per block: `timed` measures one thread, and several threads would round sums in another order.
        torch.set_num_threads(1)
        self.threads = threads if device == "cpu" else 1
        self.ladder, self.solver, self.device = ladder, solver, device
        self.samples, self.seed, self.cache = samples, seed, cache
        self._warm = False
        # Before several threads ask for conditions.
        ladder.condition(torch.arange(ladder.conditions, device=device))
        self.use({k: ladder.load_level(k, device) for k in range(1, len(ladder.levels) + 1)})
        self.fine = solver_table(ladder.process, steps, solver)

    def use(self, levels: dict[int, nn.Module]) -> None:
        """Run `levels` instead of the ladder's levels. A reference that is already computed does not change."""
        self.levels = levels
        self._run: dict[int, Drift] = {k: as_run(level, self.device) for k, level in levels.items()}

    def condition(self, block: int) -> Condition:
        """The condition of a block, the same in all blocks if there are at most B classes or prompts."""
        first = block * self.block if self.ladder.conditions > self.block else 0
        return self.ladder.condition(torch.arange(first, first + self.block, device=self.device))

    def closed_form(self, block: int, table: StepTable, path: bool = False) -> ClosedForm:
        """The closed form of a block's runs of steps with level 1, a Gaussian; `path` is as for `ClosedForm`."""
        base = self.levels[1]
        assert isinstance(base, GaussianLevel)
        return base.closed_form(base.affine(table.t), table, self.condition(block), self.block, path)

    def _step_noise(self, block: int) -> Noise:
        first = set_seed(self.seed) + block * self.block
        return image_noise(range(first, first + self.block), self.ladder.sample_shape, self.device)

    def noise(self, block: int, steps: int) -> Noise:
        """Noise of a block for `steps` steps, from one Brownian path for every number of steps.

        For the SDE, `steps` must divide the length of `self.fine`.
        """
        return coarse_noise(self._step_noise(block), self.fine, len(self.fine) // steps)

    @cached_property
    def reference(self) -> Tensor:
        """Final samples of the best level at every step, float32 (samples, C, H, W)."""
        # The noise is part of the name: a version that drew other noise may have cached a reference for other paths.
        noise = hashlib.sha256(self.noise(0, len(self.fine))(-1).cpu().numpy().tobytes()).hexdigest()[:8]
        settings = self.ladder.digest[:12], self.solver, len(self.fine), self.seed, noise, self.samples, self.device
        prompts = [hashlib.sha256(json.dumps(self.ladder.prompts).encode()).hexdigest()[:8]] * bool(self.ladder.prompts)
        identity = *settings, *prompts
        name = f"{'-'.join(map(str, identity))}.safetensors"
        if self.cache and (self.cache / name).exists():
            return load_file(self.cache / name, device=self.device)["reference"]
        best = single_level(len(self.levels), len(self.levels), len(self.fine))
        ends = self._ends(lambda block: self.end(best, block))
        if self.cache:
            save_tensors(self.cache / name, {"reference": ends.cpu()})
        return ends

    def measure(self, plan: Plan | Recipe) -> Measurement:
        """Verdict on a memorised plan, or on a recipe from which each block draws its own plan."""
        plans = self._plans(plan)
        plain = self._step_noise(0)
        condition = self.condition(0)
        table, closed_form = self._grid(plans[0], 0, path=False)
        seconds = self.timed(lambda: integrate(self._run, table, plans[0], plain, condition, closed_form))
        # The costs of drawn plans differ, with independent coins by a third and more: scale to the mean cost.
        cost = self.ladder.costs(self.device)
        seconds *= float(np.mean([plan.nfe(cost) for plan in plans])) / plans[0].nfe(cost)
        return self.measurement(seconds, lambda block: self.end(plans[block], block))

    def errors(self, plans: Sequence[Plan | Recipe], progress: ReportProgress = lambda done, total: None) -> np.ndarray:
        """Errors of several plans or recipes, float64 (plans, n), as in their verdicts but without timing.

        `progress` is called with the number of plans done and their total number.
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

    def measurement(self, seconds: float, end: Callable[[int], Tensor]) -> Measurement:
        """Verdict on any method `end` that returns the final samples (B, C, H, W) of a block, given its number."""
        return Measurement(seconds, _errors(self._ends(end), self.reference))

    def timed(self, run: Callable[[], Tensor]) -> float:
        """Seconds per sample of `run`, which advances one block: CPU time of this thread, or wall time on a GPU."""
        clock = time.perf_counter if self.device == "cuda" else time.thread_time
        if self.device == "cuda" or not self._warm:
            # Warm-up: the first run also loads and chooses kernels, and allocates memory.
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
        """Final samples of a block with a plan, float32 (B, C, H, W), on the Brownian path that all plans share."""
        table, closed_form = self._grid(plan, block, path=True)
        return integrate(self._run, table, plan, self.noise(block, len(table)), self.condition(block), closed_form)

    def _grid(self, plan: Plan, block: int, path: bool) -> tuple[StepTable, ClosedForm | None]:
        """Step table of a plan and, if the plan collapses, its closed form; with `path`, for the noise of each step."""
        table = solver_table(self.ladder.process, plan.fire.shape[1], self.solver)
        return table, self.closed_form(block, table, path) if plan.collapse else None


def _errors(end: Tensor, reference: Tensor) -> np.ndarray:
    errors: np.ndarray = (end - reference).square().flatten(1).double().mean(1).cpu().numpy()
    return errors
