"""Quality at equal budgets, in the eyes of a classifier trained on real garments: what a user would run, and ours.

python benchmarks/quality/budgets.py --data /usr/share/datasets/fashion-mnist --out benchmarks/results/budgets.json

Every way has the same number of evaluations of the best level per sample. A rerun goes on where the last one stopped.
"""

import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from classifier import frechet, generate, seen, train

from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import Plan, single_level, switched, write_plan

SMALL = 3
"""The level that T-Stitch begins with, for half of its steps."""


def ways(ladder: Ladder, nfe: int) -> Iterator[tuple[str, str, Plan | None, int]]:
    """Name, solver, plan or None for the default of that budget, and steps."""
    levels = len(ladder.levels)
    cost = ladder.cost("cpu")
    best = single_level(levels, levels, nfe)
    yield "EM, DDPM", "sde", best, nfe
    yield "EM, DDIM", "ode", best, nfe
    yield "DPM-Solver++(2M)", "dpm++", best, nfe
    steps = round(2 * nfe / (1 + cost[SMALL - 1] / cost[-1]))
    stitched = switched(SMALL, levels, levels, steps, steps // 2)
    yield "T-Stitch, DDPM", "sde", stitched, steps
    yield "T-Stitch, DDIM", "ode", stitched, steps
    yield "ours, DDPM", "sde", None, 250
    yield "ours, DDIM", "ode", None, 250


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--ladder", "name", default="fashion")
@click.option("--num", default=10000, help="Samples per row.")
@click.option("--nfe", default="5,10,20")
@click.option("--classifier-steps", default=2000)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, name: str, num: int, nfe: str, classifier_steps: int, out: Path) -> None:
    """Rows of the share of samples in the class asked for, and of the Frechet distance to the real test images."""
    ladder = Ladder.load(name)
    about: dict[str, Any] = {"machine": platform.machine(), "ladder": ladder.digest, "num": num}
    kept = json.loads(out.read_text()) if out.exists() else about | {"rows": []}
    rows = kept.pop("rows")
    if kept != about:
        raise click.UsageError(f"{out} is of other options than these; choose another --out")
    real = load_images(data, ladder.sample_shape, ladder.labels)
    judge = train(real.train, real.train_label, classifier_steps)
    test, _ = seen(judge, real.test)
    for budget in map(int, nfe.split(",")):
        for way, solver, plan, steps in ways(ladder, budget):
            if any((row["way"], row["nfe"]) == (way, budget) for row in rows):
                continue
            options = ["--ladder", name, "--solver", solver, "--steps", str(steps)]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "plan.json"
                if plan:
                    write_plan(file, plan, ladder.digest, solver)
                    options += ["--plan", str(file)]
                else:
                    options += ["--nfe", str(budget)]
                images, label, rate = generate(num, options)
            features, classes = seen(judge, images)
            accuracy = float((classes == label.numpy()).mean())
            rows.append({"way": way, "nfe": budget, "accuracy": accuracy, "frechet": frechet(features, test)})
            rows[-1]["images_per_s"] = rate
            print(rows[-1], flush=True)
            out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
