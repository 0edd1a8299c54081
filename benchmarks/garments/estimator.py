"""The paper's estimator, ML-EM, on the unguided levels of `garments`: exponents, predicted and measured speed-up.

python benchmarks/garments/composites.py --num 5000 --out DATA
python benchmarks/garments/estimator.py --data DATA --work WORK --out benchmarks/results/garments-estimator.json

WORK/plain is made, the ladder of the Gaussian and the three networks without guidance, and calibrated with images and
captions of DATA. For every number m of Euler-Maruyama steps, the calibration predicts the budget at which ML-EM with
independent coins has the same error to the best level at every step. ML-EM is then run on noises of its own, at that
budget, or at STEPS / 2 evaluations if it is larger, and at larger or smaller ones until its errors lie around that of
Euler-Maruyama. The measured speed-up is at equal error, interpolated between the last two budgets. Samples of a block
share a drawn plan, so an error is that of SAMPLES / 32 plans. The same command goes on with the rows that OUT lacks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from race import Competitors

from mlem_dist import api
from mlem_dist.dataset.prompts import first_prompts
from mlem_dist.ladder.calibration import stored
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import single_level
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.recipes import make_recipe

STEPS, SAMPLES = 100, 64
"""Number of steps of the best level, and of samples, that errors are measured with."""

LEVELS = ("gaussian", "small", "medium", "large")
"""Levels of the ladder: those without guidance."""


def errors_around(error: Callable[[float], float], target: float, nfe: float) -> dict[float, float]:
    """Errors by budget, from `nfe` on by factors of sqrt(2), until two of them lie around `target`.

    Budgets stay below STEPS evaluations, at which ML-EM is the best level itself: a step covers half of the distance at
    most.
    """
    errors = {nfe: error(nfe)}
    rising = errors[nfe] > target
    while (errors[nfe] > target) == rising:
        nfe = min(nfe * math.sqrt(2), (nfe + STEPS) / 2) if rising else nfe / math.sqrt(2)
        errors[nfe] = error(nfe)
    return errors


def budget_at(target: float, errors: dict[float, float]) -> float:
    """Budget at which the error is `target`, between the last two of `errors_around`."""
    budgets = sorted([*errors][-2:])
    logs = [-math.log(errors[nfe]) for nfe in budgets]
    return float(np.exp(np.interp(-math.log(target), logs, np.log(budgets))))


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, work: Path, out: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    plain = Competitors(Ladder.load("garments"), work).part("plain", LEVELS)
    prompts = min((data / "data").glob("train-*.parquet"))
    if not stored(plain.folder, plain):
        api.calibrate(plain, data=data, prompts=prompts)
    calibration = next(iter(stored(plain.folder, plain).values()))
    ladder = replace(plain, prompts=first_prompts(str(prompts), "prompt"))
    cost = ladder.costs("cpu")
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    for solver, measured in calibration["solvers"].items():
        comparison = PlanComparison(ladder, solver, "cpu", STEPS, SAMPLES, 1, threads=2)
        for row in measured["speed_up"]:
            em_steps, predicted_nfe = row["em_steps"], row["nfe"]
            if any((line["solver"], line["em_steps"]) == (solver, em_steps) for line in rows):
                continue

            def ml_em(nfe: float, comparison: PlanComparison = comparison, solver: str = solver) -> float:
                recipe = make_recipe(ladder, cost, solver, STEPS, nfe, increments="impulse", draw="independent")
                return float(comparison.errors([recipe]).mean())

            em_error = float(comparison.errors([single_level(len(cost), len(cost), em_steps)]).mean())
            errors = errors_around(ml_em, em_error, min(predicted_nfe, STEPS / 2))
            rows.append(
                {
                    "solver": solver,
                    "em_steps": em_steps,
                    "em_error": em_error,
                    "predicted_nfe": predicted_nfe,
                    "predicted": row["ratio"],
                    "interval": row["interval"],
                    "errors": {f"{nfe:.4g}": value for nfe, value in sorted(errors.items())},
                    "measured": em_steps / budget_at(em_error, errors),
                }
            )
            click.echo(json.dumps(rows[-1]))
            out.write_text(json.dumps({"gamma": calibration["gamma"], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
