"""Direct search for plans: an evolution strategy optimises each level's call times and the reach of its extrapolation.

Let D_k(i) be the increment of level k evaluated at step i of a trajectory of the best level, and J_j the derivative of
the final sample with respect to x_{j+1}. A plan uses increments of other steps i at step j. To first order, its final
sample has the error

    e = sum_j sum_k J_j b_j (sum_i w_kij D_k(i) - D_k(j)) .

For a probe v of independent random signs, E<v, e>^2 = |e|^2. One backward pass over each trajectory gives the numbers
<v, J_j b_j D_k(i)> of all pairs of steps, and these numbers give the error of *any* plan in a millisecond. The search
has a few variables: the shape of each level's density of call times, and its reach. It takes seconds, and has too few
variables to fit the noise. The plans found hold or extrapolate increments, and share the bias of these increments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlem_dist.solver.condition import Condition
from mlem_dist.solver.integrate import Drift
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import Plan, Recipe
from mlem_dist.solver.steps import StepTable, solver_table
from mlem_dist.tuning.calibrate import adjoint, best_trajectory
from mlem_dist.tuning.comparison import PlanComparison, set_seed
from mlem_dist.tuning.recipes import NeymanRule
from mlem_dist.tuning.reporting import ReportProgress

KNOTS = 6
"""Number of knots per level, equally spaced over the trajectory. The log factor of a density is linear between them."""

DENSITY_SCALE, REACH_SCALE = 0.5, 0.25
"""Initial standard deviations of the search, for the log factors of a density and for the reach."""

PENALTY = 0.02
"""Weight of the penalty on the mean square of all search variables, relative to the error at the start."""

POPULATION, GENERATIONS = 16, 60
RUNG_SETS = 3
"""Number of choices of rungs that the search tries, the most promising ones."""

MODEL_STEPS, MODEL_SAMPLES, MODEL_SEED = 100, 128, 2

LARGEST = 25.0
"""Largest budget of the search, in evaluations of the best level. The model has too few steps for larger budgets, which
take the shape of this one."""


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """First-order model of the error of plans.

    Attributes:
        effects: <v, J_j b_j D_k(i)> divided by the square root of the number of values, at [k, i, j], float32
            (K, N, N, B); 0 for i > j, because no plan uses later evaluations.
    """

    effects: np.ndarray

    def error(self, plan: Plan) -> float:
        """Mean squared error per value of a plan against the best level at every step."""
        levels, steps = plan.fire.shape
        j = np.arange(steps)
        error_per_sample = np.zeros(self.effects.shape[3])
        for k in range(levels):
            latest, before = evaluations_in_use(plan.fire[k])
            used = plan.weight[k, :, None] * (latest >= 0)[:, None] * self.effects[k, latest, j]
            used += plan.previous[k, :, None] * (before >= 0)[:, None] * self.effects[k, before, j]
            error_per_sample += (used - self.effects[k, j, j]).sum(0)
        return float(np.square(error_per_sample).mean())


def evaluations_in_use(fire: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the latest evaluation at each step and of the evaluation before it, int64 (N,) each; -1 for none."""
    at = np.concatenate([[-1, -1], np.flatnonzero(fire)])
    count = np.cumsum(fire)
    return at[count + 1], at[count]


def model_steps(comparison: PlanComparison) -> int:
    """Number of steps of the model: at most `MODEL_STEPS` and the length of the noise schedule."""
    return min(MODEL_STEPS, comparison.ladder.process.length)


def first_order(
    comparison: PlanComparison, samples: int, threads: int, progress: ReportProgress = lambda done, total: None
) -> FirstOrder:
    """First-order model for the ladder and solver of a comparison, on noises of its own and `model_steps` steps.

    At each step of each sample, evaluates every level once and makes one backward pass through the best level. Holds
    all increments of `threads` blocks, and 4 K N^2 bytes per sample.

    Args:
        samples: number of samples, a multiple of the comparison's block size.
        threads: number of blocks computed at a time.
        progress: callback with the number of blocks done and their total number.
    """
    generator = torch.Generator().manual_seed(MODEL_SEED)
    table = solver_table(comparison.ladder.process, model_steps(comparison), comparison.solver)
    blocks = range(samples // comparison.block)
    shape = (comparison.block, *comparison.ladder.sample_shape)
    probes = [torch.randint(2, shape, generator=generator).to(comparison.device) * 2.0 - 1 for _ in blocks]
    done = 0

    def block_effects(block: int) -> np.ndarray:
        nonlocal done
        first = set_seed(MODEL_SEED) + block * comparison.block
        noise = image_noise(range(first, first + comparison.block), shape[1:], comparison.device)
        effects = pair_effects(comparison.levels, table, noise, comparison.condition(block), probes[block])
        done += 1
        progress(done, len(blocks))
        return effects

    progress(0, len(blocks))
    with ThreadPoolExecutor(threads) as pool:
        return FirstOrder(np.concatenate(list(pool.map(block_effects, blocks)), axis=3))


def pair_effects(
    levels: Mapping[int, Drift], table: StepTable, noise: Callable[[int], Tensor], condition: Condition, probe: Tensor
) -> np.ndarray:
    """`FirstOrder.effects` of a block.

    Args:
        levels: the levels, by number 1 ... K.
        table: step table without memory: each step uses one evaluation of the drift.
        noise: noise by step, as for `integrate`; step -1 is the initial state.
        condition: the condition of the block.
        probe: v, signs +-1 in the shape of x.
    """
    states = best_trajectory(levels, table, noise, condition)
    steps, scale = len(table), probe[0].numel() ** 0.5
    adjoints, values = torch.empty(steps, *probe.shape), torch.empty(steps, len(levels), *probe.shape)
    for i, g, increments in adjoint(levels, table, states, condition, probe):
        adjoints[i], values[i] = float(table.b[i]) * g / scale, increments
    adjoints, values = adjoints.flatten(2), values.flatten(3)
    effects = np.zeros((len(levels), steps, steps, len(probe)), dtype=np.float32)
    for j in range(steps):
        effects[:, : j + 1, j] = torch.einsum("bd,ikbd->kib", adjoints[j], values[: j + 1]).numpy()
    return effects


@dataclass(frozen=True, eq=False)
class Shape:
    """Result of the search, independent of the number of steps and the budget.

    Attributes:
        rungs: the levels in use.
        factors: logarithms of the factors on the rule's probabilities, float64 (S, KNOTS), for the S rungs whose
            evaluations the search places: all, or all but a first one in closed form.
        reach: reach of the extrapolation of their increments, float64 (S,): 0 holds them, 1 follows the line.
    """

    rungs: tuple[int, ...]
    factors: np.ndarray
    reach: np.ndarray

    def recipe(self, rule: NeymanRule, nfe: float) -> Recipe:
        """Recipe on the rule's steps, for a budget of `nfe` evaluations of the best level.

        Raises:
            UsageError: if the budget is below the cost of the base level.
        """
        at, knots = np.linspace(0, 1, len(rule.log_snr)), np.linspace(0, 1, KNOTS)
        free = [np.zeros(len(at))] * (len(self.rungs) - len(self.factors))
        density = np.exp([*free, *(np.interp(at, knots, row) for row in self.factors)])
        p = rule.probabilities(nfe, self.rungs, density)
        reach = (*(0.0 for _ in free), *self.reach.tolist())
        collapse, nested = rule.base == "closed", rule.base == "held"
        return Recipe(p, "quantiles", "extrapolated", collapse, rule.log_snr, self.rungs, reach, nested)


def optimise(model: FirstOrder, rule: NeymanRule, reach: float, nfe: float) -> list[Shape]:
    """Shape of least model error for each of the most promising choices of rungs, best first.

    `rule` is on the model's steps. `nfe` is the budget, in evaluations of the best level. The search is the covariance
    matrix adaptation evolution strategy (Hansen, arXiv:1604.00772). It starts from the rule's probabilities and the
    extrapolation reach `reach`.
    """
    import cma

    shapes = []
    nfe = min(nfe, LARGEST)
    for rungs in rule.choices(nfe)[:RUNG_SETS]:
        rows = len(rungs) - (rule.base == "closed")

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
