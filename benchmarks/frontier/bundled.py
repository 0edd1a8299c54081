"""Errors of the bundled plans and of fast solvers, beside those that an earlier version has measured.

python benchmarks/frontier/bundled.py --out benchmarks/results/frontier-bundled

The reference is the best level at all 1,000 timesteps. Version 0.3 drew other noises, so that errors agree within the
intervals of their means, by bootstrap over samples. A rerun goes on where the last one stopped.
"""

import json
from pathlib import Path

import click
import numpy as np
from frontier import BASE_STEPS, FAST, fast

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.frontier import Frontier
from mlem_dist.tuning.tune import TEST_SEED
from mlem_dist.tuning.tuned_plans import tuned_plan

BUDGETS, PLAN_STEPS, RESAMPLES = (5, 10, 20), 250, 2000


def interval(errors: np.ndarray) -> list[float]:
    """Mean, and 95 % interval of the mean."""
    rng = np.random.default_rng(0)
    means = errors[rng.integers(len(errors), size=(RESAMPLES, len(errors)))].mean(1)
    return [float(value) for value in (errors.mean(), *np.quantile(means, [0.025, 0.975]))]


@click.command()
@click.option("--samples", default=128)
@click.option("--threads", default=1)
@click.option(
    "--before", type=click.Path(path_type=Path), default=Path("benchmarks/results/frontier-fitted/frontier-ode.json")
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(samples: int, threads: int, before: Path, out: Path) -> None:
    """Write OUT/frontier-ode.json and OUT/intervals.json."""
    ladder = Ladder.load("fashion")
    judge = PlanComparison(ladder, "ode", "cpu", BASE_STEPS, samples, TEST_SEED, out / "cache", threads)
    out.mkdir(parents=True, exist_ok=True)
    frontier = Frontier(out / "frontier-ode.json", {"ladder": ladder.digest, "samples": samples, "steps": BASE_STEPS})
    earlier = {(row["family"], row["label"]): row["errors"] for row in json.loads(before.read_text())["rows"]}
    rows = []
    for nfe in BUDGETS:
        plan = tuned_plan(ladder, "ode", PLAN_STEPS, nfe)
        assert plan is not None
        bundled = frontier.find("bundled plan", f"{nfe} NFE")
        measured = [bundled or frontier.add("bundled plan", f"{nfe} NFE", judge.measure(plan))]
        for name in FAST:
            label = f"{nfe} steps"
            measured.append(frontier.find(name, label) or frontier.add(name, label, fast(name, nfe, judge)))
        for row in measured:
            entry = {"family": row.family, "label": row.label, "now": interval(row.errors)}
            if errors := earlier.get((row.family, row.label)):
                entry["before"] = interval(np.array(errors))
            rows.append(entry)
            print(entry, flush=True)
    (out / "intervals.json").write_text(json.dumps({"samples": samples, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
