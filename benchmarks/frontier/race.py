"""A race of a ladder's plans with fast solvers on its best level, for the benchmarks of several ladders."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
from frontier import FAST, fast

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import read_plan
from mlem_dist.tuning.comparison import Measurement, PlanComparison
from mlem_dist.tuning.frontier import Row
from mlem_dist.tuning.tune import FITTING_SAMPLES, TEST_SAMPLES, TEST_SEED, open_frontier, tune
from mlem_dist.tuning.tuned_plans import plan_path

STEPS = 250

Solver = Callable[[int, PlanComparison], Measurement]
"""A fast solver on the best level, given a number of evaluations."""

SOLVERS: Mapping[str, Solver] = {name: partial(fast, name) for name in FAST}


def race_command(main: Callable[[Path, Path, int, Path], None]) -> click.Command:
    """A command of a trained ladder's `folder`, its `data`, the number of `threads` and the folder `out`."""
    options = (
        click.option("--ladder", "folder", type=click.Path(path_type=Path), required=True),
        click.option("--data", type=click.Path(path_type=Path), required=True),
        click.option("--threads", default=2),
        click.option("--out", type=click.Path(path_type=Path), required=True),
    )
    for option in reversed(options):
        main = option(main)
    return click.command()(main)


def race(
    name: str,
    ladder: Ladder,
    budgets: Sequence[float],
    fast_nfe: Sequence[int],
    out: Path,
    threads: int,
    steps: int = STEPS,
    solvers: Mapping[str, Solver] = SOLVERS,
    samples: int = FITTING_SAMPLES,
) -> None:
    """Write OUT/frontier-ode.json and the plans of a ladder, and print its rows, those of fast solvers too."""
    out.mkdir(parents=True, exist_ok=True)
    frontier, best = open_frontier(ladder, "ode", steps, "cpu", out), float(ladder.cost("cpu")[-1])

    def tell(row: Row) -> None:
        median = float(np.median(row.errors))
        print(
            f"{name}: {row.family}, {row.label}: {row.seconds / best:.1f}, MSE {row.error:.5f}, median {median:.5f}",
            flush=True,
        )

    for row in tune(ladder, "cpu", budgets, frontier, threads, lambda stage, done, total: None, samples):
        tell(row)
    for budget in budgets:
        plan = read_plan(plan_path(out, "ode", budget), ladder.digest, len(ladder.levels), "ode", steps)
        calls = ", ".join(map(str, plan.calls.sum(1)))
        print(f"{name}: plan of {budget} NFE: {plan.nfe(ladder.costs('cpu')):.1f}, calls of levels {calls}", flush=True)
    judge = PlanComparison(ladder, "ode", "cpu", steps, TEST_SAMPLES, TEST_SEED, out / "cache", threads)
    for family, solver in solvers.items():
        for nfe in fast_nfe:
            label = f"{nfe} NFE"
            tell(frontier.find(family, label) or frontier.add(family, label, solver(nfe, judge)))
