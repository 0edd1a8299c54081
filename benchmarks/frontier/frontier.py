"""Error against time for every way to spend it: Figure 1 of Jacot, arXiv:2603.24594, on a ladder.

python benchmarks/frontier/frontier.py --solver sde --out benchmarks/results/frontier
python benchmarks/frontier/frontier.py --solver ode --out benchmarks/results/frontier

Every run starts from the same noises and follows the same Brownian path; the reference is the best level at every
timestep of the noise schedule. A rerun goes on where the last one stopped.
"""

import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from learn import Logistic, fit_logistic, learn, scaled, with_budget
from torch import Tensor

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.graphs import as_run
from mlem_dist.report.figures import save_frontier
from mlem_dist.solver.condition import join
from mlem_dist.solver.plan import Recipe, single_level, switched
from mlem_dist.solver.probabilities import expected_cost
from mlem_dist.solver.steps import solver_table
from mlem_dist.tuning.comparison import Measurement, PlanComparison
from mlem_dist.tuning.frontier import Frontier
from mlem_dist.tuning.least_squares import Fitter
from mlem_dist.tuning.recipes import make_recipe
from mlem_dist.tuning.refinement import fitted_plan
from mlem_dist.tuning.tune import (
    DRAWS,
    FITTED,
    FITTING_SAMPLES,
    FITTING_SEED,
    OPTIMISED,
    SELECTION_SEED,
    TEST_SEED,
    Optimiser,
    best_draw,
)
from mlem_dist.tuning.tune import FAMILIES as TUNED

BASE_STEPS, SELECTION_SAMPLES = 1000, 64
BEST_EM_STEPS = (5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500)
EM_STEPS = (5, 10, 25, 50, 100, 250, 500)
BUDGETS, DDPM_BUDGET = (5, 10, 20, 40, 80), 160
"""Only for the SDE do held increments need so much for an error of 3e-4."""

MEMORISED_BUDGETS = (5, 10, 20, 40)
SEARCHED_BUDGETS, OPTIMISER_SAMPLES = (2, 3, 4, 5, 7, 10, 14, 20, 40, 80), 256
FITTED_BUDGETS = (1.1, 1.3, 1.6, 2, 2.5, 3, 4, 5, 6, 8, 10, 14, 20, 40, 80)
FAST_STEPS = (3, 4, 5, 8, 10, 15, 20, 30, 40)
STITCH_STEPS = (10, 20, 50)
STITCHES = (0.25, 0.5, 0.75)
LEARN_STEPS, LEARN_NFE, UPDATES = 100, 10, 40
DELTAS = (-3, -2, -1, 0, 1, 2, 3)
MOST_NFE = 100

OURS = {name: TUNED[name] for name in ("held", "extrapolated")}
FAMILIES = OURS | {
    "held, quantiles": {"increments": "held", "draw": "quantiles"},
    "ML-EM, Neyman": TUNED["ML-EM"],
    "ML-EM, theory": TUNED["ML-EM"] | {"probabilities": "theory"},
}


def untold(*progress: object) -> None:
    """Progress that nobody is told."""


EVERY_DRAW = "ML-EM, learned, 15 draws"
Case = tuple[str, str, Callable[[], Measurement]]


def cases(judge: PlanComparison, choosing: PlanComparison) -> Iterator[Case]:
    """Family, label, and how to run it; the most interesting first."""
    ladder, solver = judge.ladder, judge.solver
    levels, cost = len(ladder.levels), ladder.cost(judge.device)

    def recipe(nfe: float, choices: dict[str, Any]) -> Recipe:
        return make_recipe(ladder, cost, solver, BASE_STEPS, nfe, **choices)

    def memorised(nfe: float) -> Measurement:
        recipes = {name: recipe(nfe, choices) for name, choices in OURS.items()}
        return judge.measure(best_draw(choosing, recipes, cost))

    for name, choices in FAMILIES.items():
        for nfe in (*BUDGETS, DDPM_BUDGET) if solver == "sde" and name in OURS else BUDGETS:
            yield name, f"{nfe} NFE", lambda nfe=nfe, choices=choices: judge.measure(recipe(nfe, choices))
    for k in range(levels, 0, -1):
        for steps in BEST_EM_STEPS if k == levels else EM_STEPS:
            plan = single_level(k, levels, steps)
            yield f"EM, {ladder.levels[k - 1].name}", f"{steps} steps", lambda plan=plan: judge.measure(plan)
    if solver == "ode":
        for name in FAST:
            for steps in FAST_STEPS:
                yield name, f"{steps} steps", partial(fast, name, steps, judge)
    for nfe in MEMORISED_BUDGETS:
        yield "memorised", f"{nfe} NFE", partial(memorised, nfe)
    optimiser = Optimiser(choosing, 1, untold, OPTIMISER_SAMPLES)
    for nfe in SEARCHED_BUDGETS:
        yield OPTIMISED, f"{nfe} NFE", lambda nfe=nfe: judge.measure(optimiser.plan(nfe))
    if solver == "ode":
        fitter = Fitter(
            PlanComparison(ladder, solver, judge.device, BASE_STEPS, FITTING_SAMPLES, FITTING_SEED, threads=2)
        )
        for nfe in FITTED_BUDGETS:
            yield FITTED, f"{nfe} NFE", lambda nfe=nfe: judge.measure(fitted_plan(fitter, nfe, untold, untold))
    for small in range(3, levels):
        for steps in STITCH_STEPS:
            for part in STITCHES:
                at = round(part * steps)
                plan = switched(small, levels, levels, steps, at)
                label = f"{ladder.levels[small - 1].name} for {at} of {steps} steps"
                yield "T-Stitch", label, lambda plan=plan: judge.measure(plan)


def learned_cases(judge: PlanComparison, choosing: PlanComparison, frontier: Frontier) -> Iterator[Case]:
    """The paper's: learned coefficients moved by Delta, draws on one set of noises, the best of them on the other."""
    logistic, rungs = learned(choosing, frontier.path.parent / f"learned-{judge.solver}.json")
    cost = judge.ladder.cost(judge.device)
    for delta in DELTAS:
        p = logistic.moved(np.array([[0.0], [delta]])).probabilities
        if expected_cost(p, cost[np.array(rungs) - 1], "closed") > MOST_NFE * cost[-1]:
            continue
        recipe = Recipe(p, "independent", "impulse", collapse=True, rungs=rungs)
        plans = [recipe.plan(np.random.default_rng(seed)) for seed in range(DRAWS)]
        labels = [f"{delta:+d}, draw {seed}" for seed in range(DRAWS)]
        for label, plan in zip(labels, plans, strict=True):
            yield EVERY_DRAW, label, lambda plan=plan: choosing.measure(plan)
        rows = [frontier.find(EVERY_DRAW, label) for label in labels]
        best = plans[int(np.argmin([row.error for row in rows if row]))]
        yield "ML-EM, learned, best draw", f"{delta:+d}", lambda best=best: judge.measure(best)
        yield "ML-EM, learned", f"{delta:+d}", lambda recipe=recipe: judge.measure(recipe)


def learned(choosing: PlanComparison, path: Path) -> tuple[Logistic, tuple[int, ...]]:
    """Coefficients learned from Neyman's probabilities at one budget, for `BASE_STEPS`, and the rungs they are for.

    They are learned on fewer steps. The number of evaluations is what matters, not that of steps they are drawn at
    (the Poisson limit), so one number is added to every beta, which brings the same budget to more steps.
    """
    ladder, solver = choosing.ladder, choosing.solver
    recipe = make_recipe(ladder, ladder.cost(choosing.device), solver, LEARN_STEPS, LEARN_NFE, draw="independent")
    rungs = recipe.rungs or tuple(range(1, len(ladder.levels) + 1))
    cost = ladder.cost(choosing.device)[np.array(rungs) - 1]

    def tau(steps: int) -> np.ndarray:
        return scaled(ladder.process.grid(steps).log_snr)

    if not path.exists():
        blocks = choosing.samples // choosing.block
        noises = [choosing.noise(block, LEARN_STEPS) for block in range(blocks)]
        path_of_all = torch.stack([torch.cat([z(i) for z in noises]) for i in range(-1, LEARN_STEPS)])
        steps = learn(
            {r: choosing.levels[k] for r, k in enumerate(rungs, 1)},
            solver_table(ladder.process, LEARN_STEPS, solver),
            fit_logistic(recipe.probabilities, tau(LEARN_STEPS)),
            cost,
            lambda i: path_of_all[i + 1],
            join([choosing.condition(block) for block in range(blocks)]),
            choosing.reference,
            seed=0,
        )
        history = []
        for step in islice(steps, UPDATES + 1):
            print(f"{solver} update {len(history)}: error {step.error:.4f}, {step.cost / cost[-1]:.2f} NFE", flush=True)
            history.append(
                {"error": step.error, "cost": step.cost, "coefficients": step.logistic.coefficients.tolist()}
            )
        path.write_text(json.dumps({"ladder": ladder.digest, "rungs": rungs, "history": history}, indent=1) + "\n")
    found = json.loads(path.read_text())
    assert found["ladder"] == ladder.digest
    # Adam's steps wander about where they end.
    coefficients = np.mean([step["coefficients"] for step in found["history"][-UPDATES // 4 :]], axis=0)
    logistic = Logistic(coefficients, tau(BASE_STEPS))
    at_budget = with_budget(logistic, lambda p: expected_cost(p, cost, "closed"), LEARN_NFE * cost[-1])
    return at_budget, tuple(found["rungs"])


FAST = {
    "DPM-Solver++(2M), trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "DPM-Solver++(2M), lu-lambdas": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "UniPC, linspace": ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
}


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FAST_FLOWS = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", FLOW),
    "UniPC": ("UniPCMultistepScheduler", FLOW),
    "UniPC, shift 0.6": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 0.6}),
}
"""Fast solvers of flows, with the shift of the ladder unless they have another one."""


def fast(name: str, nfe: int, judge: PlanComparison) -> Measurement:
    """A fast solver of diffusers with the best level alone, at most `nfe` times."""
    import diffusers

    kind, options = (FAST | FAST_FLOWS)[name]
    config = dict(judge.ladder.scheduler)
    if "use_flow_sigmas" in options:
        options = {"flow_shift": config["shift"], **options}
    # Heun's method evaluates twice at each step but the last.
    steps = (nfe + 1) // 2 if kind == "FlowMatchHeunDiscreteScheduler" else nfe
    best = as_run(judge.levels[len(judge.levels)], judge.device)

    @torch.inference_mode()
    def end(block: int) -> Tensor:
        scheduler = getattr(diffusers, kind).from_config(config, **options)
        scheduler.set_timesteps(steps)
        x = judge.noise(block, steps=len(judge.fine))(-1)
        for t in scheduler.timesteps:
            times = t.expand(len(x)).to(x.device)
            x = scheduler.step(best(x, times, judge.condition(block)), t, x).prev_sample
        return x

    return judge.measurement(judge.timed(lambda: end(0)), end)


@click.command()
@click.option("--ladder", "name", default="fashion")
@click.option("--solver", type=click.Choice(["sde", "ode"]), required=True)
@click.option("--samples", default=256)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--family", "families", multiple=True, help="Only these, to compare them on one machine in one session.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(name: str, solver: str, samples: int, device: str, families: tuple[str, ...], out: Path) -> None:
    """Write OUT/frontier-SOLVER.json and .png."""
    ladder = Ladder.load(name)
    judge = PlanComparison(ladder, solver, device, BASE_STEPS, samples, TEST_SEED, out / "cache")
    choosing = PlanComparison(ladder, solver, device, BASE_STEPS, SELECTION_SAMPLES, SELECTION_SEED, out / "cache")
    about = {
        "ladder": ladder.digest,
        "solver": solver,
        "machine": f"{platform.machine()}, one thread" if device == "cpu" else torch.cuda.get_device_name(),
        "samples": samples,
        "block_size": judge.block,
        "reference": f"{ladder.levels[-1].name}, {BASE_STEPS} steps",
        "best_level_seconds": float(ladder.cost(device)[-1]),
    }
    frontier = Frontier(out / f"frontier-{solver}.json", about)
    learning = () if families else learned_cases(judge, choosing, frontier)
    for family, label, run in chain(cases(judge, choosing), learning):
        if not frontier.find(family, label) and (not families or family in families):
            row = frontier.add(family, label, run())
            nfe = row.seconds / float(ladder.cost(device)[-1])
            print(
                f"{solver} {family}, {label}: {row.seconds * 1e3:.1f} ms ({nfe:.1f} NFE), MSE {row.error:.5f}",
                flush=True,
            )
            save_frontier(frontier, out / f"frontier-{solver}.png")


if __name__ == "__main__":
    main()
