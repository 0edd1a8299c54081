"""How often DDPM must call the best level where its increments are held over a lower level that is free.

python benchmarks/frontier/free_levels.py --out benchmarks/results/frontier/free_levels.json

The lower level is called at every step and its time is not counted, so that the calls of the best level are all there
is; each call is one evaluation, as the lower one's is there already. Calls are at the quantiles of Neyman's density or
of that of fitted plans, from 30 % of the path on; the better one counts.
"""

import json
from pathlib import Path

import click
import numpy as np

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import held, on_levels, systematic
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.least_squares import Times
from mlem_dist.tuning.recipes import NeymanRule
from mlem_dist.tuning.tune import TEST_SEED

STEPS, CALLS, BEGIN = 250, (10, 15, 20, 30, 40), 0.3


@click.command()
@click.option("--samples", default=128)
@click.option("--threads", default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(samples: int, threads: int, out: Path) -> None:
    """Mean and median squared error to the best level at every step, by lower level and number of calls."""
    ladder = Ladder.load("fashion")
    best, rows = len(ladder.levels), []
    judge = PlanComparison(ladder, "sde", "cpu", STEPS, samples, TEST_SEED, out.parent / "cache", threads)
    rule = NeymanRule(ladder, ladder.cost("cpu"), "sde", STEPS, "held")
    for lower in range(1, best):
        rungs = (1, best) if lower == 1 else (1, lower, best)
        # A budget small enough that no probability is 1, so that it has the density's shape.
        density = rule.probabilities(2.0, rungs)[-1]
        for calls in CALLS:
            neyman = systematic(density[None] / density.sum() * calls, np.array([0.5]))[0]
            for name, called in (("neyman", neyman), ("fitted", Times(0, calls, 1, BEGIN).fire(rule.log_snr)[-1])):
                fire = np.ones((len(rungs), STEPS), dtype=bool)
                fire[-1] = called
                errors = judge.errors([on_levels(held(fire), rungs)])[0]
                row = {"lower": ladder.levels[lower - 1].name, "calls": int(called.sum()), "density": name}
                rows.append(row | {"mean": float(errors.mean()), "median": float(np.median(errors))})
                print(rows[-1], flush=True)
            result = {"ladder": ladder.digest, "steps": STEPS, "samples": samples, "rows": rows}
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
