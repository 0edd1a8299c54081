"""Search for the best plan for a budget: plans are chosen on one set of noises and tested on another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.extras import require
from mlem_dist.files import file_digest
from mlem_dist.ladder.calibration import NAME
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.costs import LevelCosts
from mlem_dist.solver.plan import Plan, Recipe, block_rng, single_level, write_plan
from mlem_dist.tuning.comparison import PlanComparison, block_size
from mlem_dist.tuning.evolution import (
    MODEL_SAMPLES,
    MODEL_STEPS,
    FirstOrder,
    Shape,
    first_order,
    model_steps,
    optimise,
)
from mlem_dist.tuning.frontier import Frontier, Row
from mlem_dist.tuning.least_squares import Fitter, bases, fitting_samples, starts
from mlem_dist.tuning.price import DERIVATIVE, STEPS, fit_evaluations
from mlem_dist.tuning.recipes import DEFAULT_INCREMENTS, NeymanRule, base_of, calibrated, make_recipe
from mlem_dist.tuning.refinement import fitted_plan
from mlem_dist.tuning.reporting import ReportProgress, ReportStage
from mlem_dist.tuning.tuned_plans import plan_path

SELECTION_SEED, TEST_SEED, FITTING_SEED = 0, 1, 2
SELECTION_SAMPLES, TEST_SAMPLES, FITTING_SAMPLES = 32, 64, 256

LEAST_SAMPLES = 64
"""Smallest number of fitting samples that a limit of time leaves."""

DRAWS = 15
"""Number of drawn plans among which the memorised one is chosen, as in Jacot, arXiv:2603.24594."""

MEMORISED, OPTIMISED, FITTED = "memorised", "optimised", "fitted"
EM = "Euler-Maruyama"
FAMILIES: dict[str, dict[str, Any]] = {
    "held": {"increments": "held", "draw": "systematic"},
    "extrapolated": {"increments": "extrapolated", "draw": "systematic"},
    "ML-EM": {"increments": "impulse", "draw": "independent"},
}
"""Recipes from which every block draws its own plan; only the last recipe is unbiased."""


def fits(ladder: Ladder, solver: str) -> bool:
    """Whether plans are fitted: for the ODE, where a level is a network."""
    return solver == "ode" and len(ladder.levels) > (ladder.levels[0].kind == "gaussian")


def evaluations(ladder: Ladder, solver: str, device: str, steps: int, budgets: Sequence[float], samples: int) -> float:
    """Evaluations of the best level that `tune` takes, at most; `samples` is the number of fitting samples."""
    spent = float(sum(min(nfe, steps) for nfe in budgets))
    tests = TEST_SAMPLES * (steps + (len(FAMILIES) + 1) * spent)
    if fits(ladder, solver):
        searched = [nfe for nfe in budgets if nfe < steps]
        chosen = TEST_SAMPLES * spent + SELECTION_SAMPLES * (steps + 2 * spent)
        return tests + chosen + fit_evaluations(len(ladder.levels), steps, searched, samples)
    total = tests + 2 * TEST_SAMPLES * spent + SELECTION_SAMPLES * (steps + (DRAWS + 2) * spent)
    if calibrated(ladder):
        alone = ladder.costs(device).alone
        total += MODEL_SAMPLES * MODEL_STEPS * (DERIVATIVE + alone.sum() / alone[-1])
    return total


def affordable_samples(
    ladder: Ladder, solver: str, device: str, steps: int, budgets: Sequence[float], minutes: float | None, threads: int
) -> tuple[int, float]:
    """The number of fitting samples for which `tune` takes about `minutes`, at most, and the seconds that it takes.

    Without `minutes`, it is `FITTING_SAMPLES` or as many as memory allows.

    Raises:
        UsageError: if `tune` takes more than `minutes` with the fewest samples, too.
    """
    # Of whole blocks on every device: the memory of the one that fits is not known here.
    block, best = block_size(ladder, device), float(ladder.cost(device)[-1])
    most = fitting_samples(ladder.sample_shape, steps, FITTING_SAMPLES, block)
    least = min(most, max(block, LEAST_SAMPLES)) if minutes is not None and fits(ladder, solver) else most
    for samples in range(most, least - 1, -block):
        seconds = evaluations(ladder, solver, device, steps, budgets, samples) * best / threads
        if minutes is None or seconds <= 60 * minutes:
            return samples, seconds
    raise UsageError(
        f"`minutes` {minutes:g}: the search takes about {seconds / 60:.3g} minutes on this device at least; raise it, "
        "or give fewer or smaller budgets as `nfe`, or fewer `steps`"
    )


def open_frontier(ladder: Ladder, solver: str, steps: int, device: str, out: Path) -> Frontier:
    """Open the frontier in `out`, or begin a new one.

    Raises:
        UsageError: as in `Frontier`.
    """
    calibration = ladder.folder / NAME
    settings = {
        "ladder": ladder.digest,
        "solver": solver,
        "steps": steps,
        "machine": "one CPU thread" if device == "cpu" else device,
        "costs": [float(f"{seconds:.4g}") for seconds in ladder.cost(device)],
        "calibration": file_digest(calibration)[:16] if calibration.exists() else None,
        "samples": TEST_SAMPLES,
        "reference": f"{ladder.levels[-1].name}, {steps} steps",
    }
    if ladder.prompts:
        settings["prompts"] = hashlib.sha256(json.dumps(ladder.prompts).encode()).hexdigest()[:16]
    return Frontier(frontier_path(out, solver), settings)


def frontier_path(out: Path, solver: str) -> Path:
    """Path of the frontier of a solver."""
    return out / f"frontier-{solver}.json"


def tune(
    ladder: Ladder,
    device: str,
    budgets: Sequence[float],
    frontier: Frontier,
    threads: int,
    progress: ReportStage,
    samples: int = FITTING_SAMPLES,
) -> Iterator[Row]:
    """Add the missing rows of every family and budget to the frontier, and write the plans beside its file.

    For the ODE, the plan of a budget is the fitted one, or the untuned default if that is nearer to the best level on
    the selection noises. For the SDE, it is the memorised one, or the optimised one if the ladder is calibrated and
    that plan is better on the selection noises. The memorised plan is the best of 15 draws from the better recipe,
    with held or with extrapolated increments. A budget that pays for the best level at every step is spent on that.
    Rows hold the error on the test noises.

    Args:
        ladder: the ladder.
        device: "cpu" or "cuda".
        budgets: evaluations of the best level per sample.
        frontier: the frontier, from `open_frontier`.
        threads: number of blocks that advance at a time.
        progress: callback with the current stage.
        samples: number of fitting samples, as in `affordable_samples`.

    Yields:
        The rows, budget by budget.

    Raises:
        UsageError: if a budget is below the cost of the base level or, where plans are fitted, of one call of the best
            level; if cma is needed and not installed; or if no plan ends in finite numbers.
    """
    out, solver, steps = frontier.path.parent, frontier.settings["solver"], frontier.settings["steps"]
    levels, cost = len(ladder.levels), ladder.costs(device)
    recipes = {nfe: _recipes(ladder, cost, solver, steps, nfe) for nfe in budgets}
    selection = PlanComparison(ladder, solver, device, steps, SELECTION_SAMPLES, SELECTION_SEED, out / "cache", threads)
    test = PlanComparison(ladder, solver, device, steps, TEST_SAMPLES, TEST_SEED, out / "cache", threads)
    searched = {nfe: recipes[nfe] for nfe in budgets if nfe < steps}
    search = plan_searches(selection, searched, threads, progress, samples)
    for nfe in budgets:
        label = f"{nfe:g} NFE"
        # For the SDE, a grid can only take every second, third, ... step of one Brownian path; the ODE has no path.
        grids = [n for n in range(1, steps + 1) if solver == "ode" or steps % n == 0]
        count = max(n for n in grids if n <= max(1, round(nfe)))
        euler = single_level(levels, levels, count)
        compared: dict[str, Plan | Recipe] = {**recipes[nfe], EM: euler}
        for done, (family, plan) in enumerate(compared.items(), 1):
            progress(f"{label}, {family}", done, len(compared))
            yield frontier.find(family, label) or frontier.add(family, label, test.measure(plan))
        path = plan_path(out, solver, nfe)
        if nfe >= steps:
            # The plan is the reference itself, and no other plan can be better.
            write_plan(path, euler, ladder.digest, solver)
            continue
        rows = {family: frontier.find(family, label) for family in search}
        if not path.exists() or not all(rows.values()):
            plans = {family: find(nfe) for family, find in search.items()}
            best = best_plan(selection, list(plans.values()), cost)
            write_plan(path, best, ladder.digest, solver)
            rows = {
                family: rows[family] or frontier.add(family, label, test.measure(plan))
                for family, plan in plans.items()
            }
        yield from (row for row in rows.values() if row)


def check_budgets(ladder: Ladder, solver: str, device: str, budgets: Sequence[float]) -> None:
    """Refuse budgets that are too small for any number of steps, before anything is measured.

    Raises:
        UsageError: if a budget is below the cost of the base level or, where plans are fitted, of one call of the best
            level.
    """
    cost = ladder.costs(device)
    for nfe in budgets:
        _recipes(ladder, cost, solver, min(STEPS[0], ladder.process.length), nfe)
        if fits(ladder, solver):
            for closed in bases(ladder):
                starts(ladder, cost, closed, nfe)


def _recipes(ladder: Ladder, cost: LevelCosts, solver: str, steps: int, nfe: float) -> dict[str, Recipe]:
    """The recipes of `FAMILIES` for a budget; without ML-EM where that cannot pay for level 1 at every step."""
    recipes = {}
    for name, choices in FAMILIES.items():
        every = base_of(ladder, solver, choices["increments"]) == "every"
        if not every or nfe * cost.alone[-1] >= steps * cost.alone[0]:
            recipes[name] = make_recipe(ladder, cost, solver, steps, nfe, **choices)
    return recipes


def plan_searches(
    selection: PlanComparison,
    recipes: Mapping[float, dict[str, Recipe]],
    threads: int,
    progress: ReportStage,
    samples: int,
) -> dict[str, Callable[[float], Plan]]:
    """Families whose plans are searched for on this ladder, each with a function that finds the plan for a budget.

    Raises:
        UsageError: as in `tune`, before any plan is measured.
    """
    ladder, solver, device, steps = selection.ladder, selection.solver, selection.device, len(selection.fine)

    def report(nfe: float, stage: str) -> Callable[[int, int], None]:
        return partial(progress, f"{nfe:g} NFE, {stage}")

    if fits(ladder, solver):
        fitter = Fitter(PlanComparison(ladder, solver, device, steps, samples, FITTING_SEED, threads=threads))
        for nfe in recipes:
            fitter.starts(nfe)

        def nearest(nfe: float) -> Plan:
            fitted = fitted_plan(fitter, nfe, report(nfe, "fits"), report(nfe, "refinement"))
            recipe = make_recipe(ladder, ladder.costs(device), solver, steps, nfe)
            untuned = recipe.plan(block_rng(SELECTION_SEED, 0))
            # Mean distances, as for the fit: squares of a few samples would choose by chance.
            return [fitted, untuned][_least(np.sqrt(selection.errors([fitted, untuned])).mean(1))]

        return {FITTED: nearest}
    cost = ladder.costs(device)
    search = {MEMORISED: lambda nfe: best_draw(selection, recipes[nfe], cost, report(nfe, "draws"))}
    if calibrated(ladder):
        require("cma", "searches for plans")
        search[OPTIMISED] = Optimiser(selection, threads, progress).plan
    return search


def best_draw(
    selection: PlanComparison,
    recipes: dict[str, Recipe],
    cost: np.ndarray | LevelCosts,
    progress: ReportProgress = lambda done, total: None,
) -> Plan:
    """Best of `DRAWS` plans drawn from the better of the recipes "held" and "extrapolated", for level costs `cost`.

    One plan for all images has no variance. It is biased, as the increments of both recipes are.
    """
    biased_recipes = [recipes["held"], recipes["extrapolated"]]
    better = biased_recipes[_least(selection.errors(biased_recipes).mean(1))]
    plans = [better.plan(np.random.default_rng(seed)) for seed in range(DRAWS)]
    return best_plan(selection, plans, cost, progress)


def best_plan(
    selection: PlanComparison,
    plans: Sequence[Plan],
    cost: np.ndarray | LevelCosts,
    progress: ReportProgress = lambda done, total: None,
) -> Plan:
    """Best of several plans of nearly the same cost, for level costs `cost`.

    Raises:
        UsageError: if there is more than one plan, and none ends in finite numbers.
    """
    if len(plans) == 1:
        return plans[0]
    # Compare error times cost, because the error falls at least as fast as 1 / cost. The ladder's costs, unlike the
    # clock, give the same choice in every run.
    error_times_cost = selection.errors(plans, progress).mean(1) * [plan.nfe(cost) for plan in plans]
    return plans[_least(error_times_cost)]


def _least(values: np.ndarray) -> int:
    """Index of the least finite value."""
    finite = np.isfinite(values)
    if not finite.any():
        raise UsageError("no plan that was tried ends in finite numbers on this ladder; raise `nfe`")
    return int(np.where(finite, values, np.inf).argmin())


class Optimiser:
    """Search by `optimise`; the selection noises decide between the shapes found. The model is computed at first use.

    Args:
        selection: comparison of plans of a calibrated ladder.
        threads: number of blocks computed at a time.
        progress: callback with the current stage.
        samples: number of samples of the model.
    """

    def __init__(
        self, selection: PlanComparison, threads: int, progress: ReportStage, samples: int = MODEL_SAMPLES
    ) -> None:
        self.selection, self.threads, self.progress, self.samples = selection, threads, progress, samples
        self.cost = selection.ladder.costs(selection.device)
        comparison_rule, model_rule = (
            NeymanRule(selection.ladder, self.cost, selection.solver, steps, "extrapolated")
            for steps in (len(selection.fine), model_steps(selection))
        )
        self.rule, self.model_rule = comparison_rule, model_rule

    @cached_property
    def model(self) -> FirstOrder:
        """First-order model of the error of plans."""
        report = partial(self.progress, "effects of increments")
        return first_order(self.selection, self.samples, self.threads, report)

    def shape(self, nfe: float) -> Shape:
        """Best shape for a budget among those found for several choices of rungs."""
        # Refuse too small a budget before the model is computed.
        self.rule.choices(nfe)
        reach = float(DEFAULT_INCREMENTS[self.selection.solver] == "extrapolated")
        model = self.model
        self.progress(f"{nfe:g} NFE, search", 0, 1)
        shapes = optimise(model, self.model_rule, reach, nfe)
        plans = [self.plan_of(shape, nfe) for shape in shapes]
        return shapes[plans.index(best_plan(self.selection, plans, self.cost))]

    def plan_of(self, shape: Shape, nfe: float) -> Plan:
        """Plan of a shape for a budget; there is only one, because a shape draws no coins."""
        return shape.recipe(self.rule, nfe).plan(np.random.default_rng(0))

    def plan(self, nfe: float) -> Plan:
        """Plan of the best shape for a budget."""
        return self.plan_of(self.shape(nfe), nfe)
