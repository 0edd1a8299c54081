"""Plans of the ODE that need no measurement, of a ladder whose first level is a Gaussian.

python benchmarks/frontier/untuned.py fashion --out benchmarks/results/untuned.json

Mean squared error, mean and median over samples, to the best level at all of 250 steps. Plans spend their budget on all
levels by the theory's probabilities, evenly on the best level above the Gaussian, or evenly on the best level alone.
OUT keeps the lines of several ladders. Those of `garments` are of the weights of commit 795a34d, DATA by composites.py:

mlem-dist ladder create garments --model benchmarks/garments/stage/small --model benchmarks/garments/stage/medium \\
    --model benchmarks/garments/stage/large --pipeline benchmarks/garments/pipeline --guidance 3 --gaussian DATA
python benchmarks/frontier/untuned.py garments --prompts examples/prompts.txt --out benchmarks/results/untuned.json
"""

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from mlem_dist.dataset.prompts import first_prompts
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import Recipe
from mlem_dist.solver.probabilities import scale_to_budget
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.recipes import make_recipe
from mlem_dist.tuning.tune import TEST_SEED

BUDGETS, STEPS = (3, 5, 10, 20), 250


def evenly(ladder: Ladder, nfe: float, rungs: tuple[int, ...]) -> Recipe:
    """Recipe that calls the last of the rungs evenly and extrapolates; the first, if there are two, is the Gaussian."""
    alone, log_snr = len(rungs) == 1, ladder.process.grid(STEPS).finite_log_snr
    cost = ladder.costs("cpu").on(rungs)
    p = scale_to_budget(np.ones((len(rungs), STEPS)), cost, nfe, "held" if alone else "closed")
    return Recipe(p, "quantiles", "extrapolated", not alone, log_snr, rungs, nested=alone)


@click.command()
@click.argument("name")
@click.option("--prompts", default="", help="File of prompts, for a ladder that is conditioned on prompts.")
@click.option("--samples", default=32, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(name: str, prompts: str, samples: int, out: Path) -> None:
    """Write the errors on the ladder NAME to OUT."""
    ladder = Ladder.load(name)
    if prompts:
        ladder = replace(ladder, prompts=first_prompts(prompts, "prompt"))
    judge, best = PlanComparison(ladder, "ode", "cpu", STEPS, samples, TEST_SEED), len(ladder.levels)
    lines = [line for line in (json.loads(out.read_text()) if out.exists() else []) if line["ladder"] != ladder.name]
    for nfe in BUDGETS:
        recipes = {
            "all levels, theory": make_recipe(ladder, ladder.costs("cpu"), "ode", STEPS, nfe, "theory"),
            "Gaussian and best level, evenly": evenly(ladder, nfe, (1, best)),
            "best level, evenly": evenly(ladder, nfe, (best,)),
        }
        errors = judge.errors([*recipes.values()])
        for way, row in zip(recipes, errors, strict=True):
            line = {"ladder": ladder.name, "nfe": nfe, "way": way, "mean": row.mean(), "median": float(np.median(row))}
            lines.append(line | {"samples": samples})
            click.echo(json.dumps(lines[-1]))
    out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
