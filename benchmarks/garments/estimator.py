"""The paper's estimator, ML-EM, on the unguided levels of `garments`: exponents, predicted and measured speed-up.

python benchmarks/garments/composites.py --num 5000 --out DATA
python benchmarks/garments/estimator.py --data DATA --work WORK --out benchmarks/results/garments-estimator.json

WORK/plain is made, the ladder of the Gaussian and the three networks without guidance, and calibrated with images and
captions of DATA. For every number m of Euler-Maruyama steps, the calibration predicts the budget at which ML-EM with
independent coins has the same error to the best level at every step. ML-EM is then run at that budget, on noises of its
own, and its error compared. The measured speed-up is at equal error, interpolated between two budgets.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from race import Competitors

from mlem_dist import api
from mlem_dist.dataset.prompts import first_prompts
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import single_level
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.recipes import make_recipe

STEPS, SAMPLES = 100, 64
"""Number of steps of the best level, and of samples, that errors are measured with."""

LEVELS = ("gaussian", "small", "medium", "large")
"""Levels of the ladder: those without guidance."""

BUDGETS = (0.5, 1.0, 2.0, 4.0)
"""Budgets at which ML-EM is measured, relative to the predicted one."""


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, work: Path, out: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    plain = Competitors(Ladder.load("garments"), work).part("plain", LEVELS)
    prompts = min((data / "data").glob("train-*.parquet"))
    calibration, _, _ = api.calibrate(plain, data=data, prompts=prompts)
    ladder = replace(plain, prompts=first_prompts(str(prompts), "prompt"))
    cost = ladder.costs("cpu")
    lines = []
    for solver, measured in calibration.solvers.items():
        comparison = PlanComparison(ladder, solver, "cpu", STEPS, SAMPLES, 1, threads=2)
        for row in measured.speed_up:
            errors = [comparison.errors([single_level(len(cost), len(cost), row.em_steps)]).mean()]
            budgets = [row.nfe * factor for factor in BUDGETS]
            errors += [
                comparison.errors(
                    [make_recipe(ladder, cost, solver, STEPS, nfe, increments="impulse", draw="independent")]
                ).mean()
                for nfe in budgets
            ]
            logs = -np.log(errors)
            # Not a number where no two budgets lie around the error.
            equal = np.exp(np.interp(logs[0], logs[1:], np.log(budgets), left=np.nan, right=np.nan))
            lines.append(
                {
                    "solver": solver,
                    "em_steps": row.em_steps,
                    "em_error": errors[0],
                    "predicted_nfe": row.nfe,
                    "predicted": row.ratio,
                    "errors": dict(zip(map(str, budgets), errors[1:], strict=True)),
                    "measured": row.em_steps / equal,
                }
            )
            click.echo(json.dumps(lines[-1]))
    gamma = {name: reading.__dict__ for name, reading in calibration.gamma.items()}
    out.write_text(json.dumps({"gamma": gamma, "rows": lines}, indent=1, default=list) + "\n")


if __name__ == "__main__":
    main()
