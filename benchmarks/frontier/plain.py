"""Error against evaluations on ladders of ordinary UNets, without a Gaussian, beside fast solvers on the best level.

python benchmarks/frontier/plain.py --ladder DIR --data /usr/share/datasets/fashion-mnist \
    --out benchmarks/results/frontier-plain

DIR holds the ladder of plain.yaml. Its two largest levels and all three are calibrated and tuned as ladders of their
own, and their plans are compared with fast solvers of diffusers on the noises that `tune` tests with. A rerun goes on
where the last one stopped.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from frontier import FAST, fast

from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.calibrate import calibrate, store
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.frontier import Row
from mlem_dist.tuning.recipes import calibrated
from mlem_dist.tuning.tune import TEST_SAMPLES, TEST_SEED, open_frontier, tune

STEPS, BUDGETS = 250, (3, 5, 10, 20, 40)
LADDERS = {"two": (2, 3), "three": (1, 2, 3)}


def part_of(ladder: Ladder, numbers: Sequence[int], folder: Path) -> Ladder:
    """A ladder of some of the levels, by number."""
    if not folder.exists():
        shutil.copytree(ladder.folder, folder, ignore=shutil.ignore_patterns("training", "calibration.json", "*.png"))
        raw = json.loads((folder / "ladder.json").read_text())
        raw["levels"] = [raw["levels"][number - 1] for number in numbers]
        (folder / "ladder.json").write_text(json.dumps(raw))
    return Ladder.load(folder)


def race(
    name: str, ladder: Ladder, budgets: Sequence[float], fast_steps: Sequence[int], out: Path, threads: int
) -> None:
    """Write OUT/frontier-ode.json and the plans of a ladder, and print its rows, those of fast solvers too."""
    out.mkdir(parents=True, exist_ok=True)
    frontier, best = open_frontier(ladder, "ode", STEPS, "cpu", out), float(ladder.cost("cpu")[-1])

    def tell(row: Row) -> None:
        median = float(np.median(row.errors))
        print(
            f"{name}: {row.family}, {row.label}: {row.seconds / best:.1f}, MSE {row.error:.5f}, median {median:.5f}",
            flush=True,
        )

    for row in tune(ladder, "cpu", budgets, frontier, threads, lambda stage, done, total: None):
        tell(row)
    judge = PlanComparison(ladder, "ode", "cpu", STEPS, TEST_SAMPLES, TEST_SEED, out / "cache", threads)
    for family in FAST:
        for steps in fast_steps:
            label = f"{steps} steps"
            tell(frontier.find(family, label) or frontier.add(family, label, fast(family, steps, judge)))


@click.command()
@click.option("--ladder", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--threads", default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(folder: Path, data: Path, threads: int, out: Path) -> None:
    """Write OUT/LADDER/frontier-ode.json and the plans of each ladder."""
    for name, numbers in LADDERS.items():
        ladder = part_of(Ladder.load(folder), numbers, folder.parent / f"{folder.name}-{name}")
        if not calibrated(ladder):
            images = load_images(data, ladder.sample_shape, ladder.labels)
            store(ladder.folder, ladder, calibrate(ladder, images.test, images.condition(images.test_label), "cpu"))
        race(name, ladder, BUDGETS, BUDGETS, out / name, threads)


if __name__ == "__main__":
    main()
