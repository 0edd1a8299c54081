"""Plans improved directly: when each level is called and how far its increments are extrapolated, by evolution.

With D_k(i) the increment of level k evaluated at step i of a trajectory of the best level, and J_j the derivative of
the final sample by x_{j+1}, a plan that uses increments of other steps i at step j ends, to first order, off by

    e = sum_j sum_k J_j b_j (sum_i w_kij D_k(i) - D_k(j)) .

For a probe v of independent random signs E<v, e>^2 = |e|^2, so that the numbers <v, J_j b_j D_k(i)> of all pairs of
steps, from one pass back over each trajectory, give the error of *any* plan in a millisecond. A search over a few
numbers, the shape of each level's density of call times and its reach, then takes seconds, and is too small to fit the
noise. What is found holds or extrapolates increments, and is biased as these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlem_dist.solver.integrate import Drift, block_noise
from mlem_dist.solver.plan import Plan, Recipe
from mlem_dist.solver.steps import StepTable, solver_table
from mlem_dist.tuning.calibrate import adjoint, best_trajectory
from mlem_dist.tuning.comparison import Judge
from mlem_dist.tuning.recipes import NeymanRule, collapses
from mlem_dist.tuning.tell import Tell

KNOTS = 6
"""Per level, equally spaced over the trajectory, between which the logarithm of a density's factor is linear."""

DENSITY_SCALE, REACH_SCALE = 0.5, 0.25
"""How far the search begins to look."""

PENALTY = 0.02
"""On the mean square of all numbers that are searched for, in the start's error."""

POPULATION, GENERATIONS = 16, 60
RUNG_SETS = 3
"""Number of choices of rungs that are tried, the most promising ones."""

MODEL_STEPS, MODEL_SAMPLES, MODEL_SEED = 100, 128, 2

LARGEST = 25.0
"""Evaluations of the best level beside the base level's; a larger budget, for which the model's steps are too few, has
this one's shape."""


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """The error of plans to first order.

    Attributes:
        effects: float32 (K, N, N, B): <v, J_j b_j D_k(i)> over the root of the number of values, at [k, i, j]; 0 for
            i > j, as no plan looks ahead.
    """

    effects: np.ndarray

    def error(self, plan: Plan) -> float:
        """The mean squared error per value against the best level at every step."""
        levels, steps = plan.fire.shape
        j = np.arange(steps)
        off = np.zeros(self.effects.shape[3])
        for k in range(levels):
            latest, before = evaluations_in_use(plan.fire[k])
            used = plan.weight[k, :, None] * (latest >= 0)[:, None] * self.effects[k, latest, j]
            used += plan.previous[k, :, None] * (before >= 0)[:, None] * self.effects[k, before, j]
            off += (used - self.effects[k, j, j]).sum(0)
        return float(np.square(off).mean())


def evaluations_in_use(fire: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 (N,) each: the step of the latest evaluation at each step, and of the one before it; -1 for none."""
    at = np.concatenate([[-1, -1], np.flatnonzero(fire)])
    count = np.cumsum(fire)
    return at[count + 1], at[count]


def model_steps(judge: Judge) -> int:
    """How many steps the model has: `MODEL_STEPS`, or all that there are of fewer.

    Where plans pay for the base level at every step, there are as many as they have, and otherwise all of the schedule.
    """
    free = collapses(judge.ladder, judge.solver)
    return min(MODEL_STEPS, len(judge.ladder.alpha_bar if free else judge.fine))


def first_order(judge: Judge, samples: int, threads: int, progress: Tell = lambda done, total: None) -> FirstOrder:
    """The model for the ladder and solver of a judge, on noises of its own and `model_steps`.

    Evaluates every level once, and passes back through the best one once, at each step of each sample. Holds all
    increments of `threads` blocks, and 4 K N^2 bytes per sample.

    Args:
        samples: a multiple of the judge's block.
        threads: blocks at a time.
        progress: told how many blocks are done, of how many.
    """
    generator = torch.Generator().manual_seed(MODEL_SEED)
    table = solver_table(judge.ladder.alpha_bar, model_steps(judge), judge.solver)
    blocks = range(samples // judge.block)
    shape = (judge.block, *judge.ladder.sample_shape)
    probes = [torch.randint(2, shape, generator=generator).to(judge.device) * 2.0 - 1 for _ in blocks]
    done = 0

    def block_effects(block: int) -> np.ndarray:
        nonlocal done
        noise = block_noise(MODEL_SEED, block, shape, judge.device)
        effects = pair_effects(judge.levels, table, noise, judge.label(block), probes[block])
        done += 1
        progress(done, len(blocks))
        return effects

    progress(0, len(blocks))
    with ThreadPoolExecutor(threads) as pool:
        return FirstOrder(np.concatenate(list(pool.map(block_effects, blocks)), axis=3))


def pair_effects(
    levels: Mapping[int, Drift], table: StepTable, noise: Callable[[int], Tensor], label: Tensor, probe: Tensor
) -> np.ndarray:
    """`FirstOrder.effects` of a block.

    Args:
        levels: by number, 1 ... K.
        table: the steps, each from one evaluation.
        noise: of each step, and of -1 for the start, as for `integrate`.
        label: int64 (B,).
        probe: v, signs +-1 in the shape of x.
    """
    states = best_trajectory(levels, table, noise, label)
    steps, scale = len(table), probe[0].numel() ** 0.5
    pulls, values = torch.empty(steps, *probe.shape), torch.empty(steps, len(levels), *probe.shape)
    for i, g, increments in adjoint(levels, table, states, label, probe):
        pulls[i], values[i] = float(table.b[i]) * g / scale, increments
    pulls, values = pulls.flatten(2), values.flatten(3)
    effects = np.zeros((len(levels), steps, steps, len(label)), dtype=np.float32)
    for j in range(steps):
        effects[:, : j + 1, j] = torch.einsum("bd,ikbd->kib", pulls[j], values[: j + 1]).numpy()
    return effects


@dataclass(frozen=True, eq=False)
class Shape:
    """What is searched for, apart from the number of steps and the budget.

    Attributes:
        rungs: the levels in use.
        factors: float64 (R - 1, KNOTS), logarithms of factors on Neyman's probabilities of each rung but the first.
        reach: float64 (R - 1,), how far each rung's increments are extrapolated: 0 holds them, 1 is the line.
    """

    rungs: tuple[int, ...]
    factors: np.ndarray
    reach: np.ndarray

    def recipe(self, rule: NeymanRule, nfe: float) -> Recipe:
        """The recipe on the rule's steps, of `nfe` evaluations of the best level.

        Raises:
            UsageError: the budget is below the cost of the base level.
        """
        at, knots = np.linspace(0, 1, len(rule.log_snr)), np.linspace(0, 1, KNOTS)
        density = np.exp([np.zeros(len(at)), *(np.interp(at, knots, row) for row in self.factors)])
        p = rule.probabilities(nfe, self.rungs, density)
        reach = (0.0, *self.reach.tolist())
        return Recipe(p, "quantiles", "extrapolated", rule.collapse, rule.log_snr, self.rungs, reach)


def optimise(model: FirstOrder, rule: NeymanRule, reach: float, spent: float) -> list[Shape]:
    """For each of the choices of rungs that promise most, the shape of least error by the model, the best first.

    `rule` is on the model's steps, and `spent` what of the budget is left beside `rule.base`. The search is the
    covariance matrix adaptation evolution strategy (Hansen, arXiv:1604.00772), from Neyman's probabilities and
    increments that are extrapolated by `reach`.
    """
    import cma

    shapes = []
    nfe = rule.base + min(spent, LARGEST)
    for rungs in rule.choices(nfe)[:RUNG_SETS]:
        rows = len(rungs) - 1

        def shape(numbers: np.ndarray, rungs: tuple[int, ...] = rungs, rows: int = rows) -> Shape:
            factors = numbers[: rows * KNOTS].reshape(rows, KNOTS) * DENSITY_SCALE
            return Shape(rungs, factors, reach + numbers[rows * KNOTS :] * REACH_SCALE)

        def error(numbers: np.ndarray, shape: Callable[[np.ndarray], Shape] = shape) -> float:
            return model.error(shape(numbers).recipe(rule, nfe).plan(np.random.default_rng(0)))

        size = rows * (KNOTS + 1)
        first = error(np.zeros(size))
        search = cma.CMAEvolutionStrategy(
            np.zeros(size), 1.0, {"seed": 1, "popsize": POPULATION, "maxiter": GENERATIONS, "verbose": -9}
        )
        while not search.stop():
            candidates = search.ask()
            search.tell(
                candidates,
                [error(numbers) + PENALTY * first * float(np.square(numbers).mean()) for numbers in candidates],
            )
        mean = np.asarray(search.result.xfavorite)
        shapes.append((error(mean), shape(mean)))
    return [shape for _, shape in sorted(shapes, key=lambda pair: pair[0])]
