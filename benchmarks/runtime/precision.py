"""What `--precision bfloat16` brings in time, and what it costs in error.

python benchmarks/runtime/precision.py --out benchmarks/results/precision.json

For the tuned plan of each budget: the mean squared error to the best level in float32 at all 250 steps, the levels in
either precision, and seconds per sample on one thread, in blocks of 32. Then the images per second of `mlem-dist
generate` on Ray, twice in either, in turn.
"""

import json
import platform
from pathlib import Path
from typing import Any

import click
from processes import generated

from mlem_dist.engine.job import PRECISIONS
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.tuned_plans import tuned_budgets, tuned_plan

LADDER, SOLVER, STEPS, SAMPLES, SEED = "fashion", "ode", 250, 256, 1


def errors(cores: int) -> list[dict[str, Any]]:
    """A row for each budget that has a tuned plan, and precision."""
    ladder = Ladder.load(LADDER)
    judge = PlanComparison(ladder, SOLVER, "cpu", STEPS, SAMPLES, SEED, threads=cores)
    rows = []
    # The first of them is float32, and with its first verdict comes the reference.
    for precision in PRECISIONS:
        judge.use({k: ladder.load_level(k, "cpu", precision) for k in judge.levels})
        for nfe in tuned_budgets(ladder.folder, SOLVER):
            plan = tuned_plan(ladder, SOLVER, STEPS, nfe)
            assert plan, "the bundled plans have 250 steps"
            measurement = judge.measure(plan)
            row = {"error": float(measurement.errors.mean()), "seconds": measurement.seconds}
            rows.append({"nfe": nfe, "precision": precision, **row})
            print(rows[-1], flush=True)
    return rows


def rate(num: int, cores: int, precision: str) -> float:
    """Images per second after loading, by the default budget."""
    report, _ = generated(num, "--address", "local", "--devices", str(cores), "--precision", precision)
    return float(report["images_per_second"])


@click.command()
@click.option("--num", default=4000)
@click.option("--cores", default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(num: int, cores: int, out: Path) -> None:
    """Errors, then rates."""
    result = {"machine": f"{platform.machine()}, {cores} cores", "samples": SAMPLES, "rows": errors(cores), "num": num}
    rates: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for _ in range(2):
        for precision, found in rates.items():
            found.append(rate(num, cores, precision))
            print(precision, found, flush=True)
    out.write_text(json.dumps(result | {"images_per_second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
