"""Guidance by a model's own direction and by that of a cheaper model, in the eyes of a classifier of real garments.

python benchmarks/quality/guides.py --ladder DIR --data /usr/share/datasets/fashion-mnist \
    --out benchmarks/results/guides.json

DIR holds the ladder of benchmarks/frontier/guided.yaml. Each row has images of the best level by DPM-Solver++(2M), the
share in the class asked for, the Fréchet distance to the real test images, and the evaluations of the larger UNet per
step by measured costs. A rerun goes on where the last one stopped.
"""

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
from classifier import frechet, generate, seen, train

from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import single_level, write_plan

SCALES = (1.3, 1.7, 2.5)
STEPS = 20


def ladders(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of the ladders: without guidance, and for each scale with both directions."""
    small, large = folder / "small", folder / "large"
    named: list[tuple[str, dict[str, Any]]] = [("unguided", {"models": [large]})]
    for scale in SCALES:
        named.append((f"{scale} by itself", {"models": [large], "guidance": scale}))
        named.append((f"{scale} by small", {"models": [small, large], "guidance": scale, "guide_with": small}))
    return named


@click.command()
@click.option("--ladder", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--num", default=2000, help="Samples per row.")
@click.option("--classifier-steps", default=2000)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(folder: Path, data: Path, num: int, classifier_steps: int, out: Path) -> None:
    """Write OUT, a row for each ladder."""
    settings: dict[str, Any] = {"machine": platform.machine(), "ladder": Ladder.load(folder).digest, "num": num}
    kept = json.loads(out.read_text()) if out.exists() else settings | {"rows": []}
    rows = kept.pop("rows")
    if kept != settings:
        raise click.UsageError(f"{out} is of other options than these; choose another --out")
    real = load_images(data, (1, 32, 32), Ladder.load(folder).labels)
    judge = train(real.train, real.train_label, classifier_steps)
    test, _ = seen(judge, real.test)
    for name, arguments in ladders(folder):
        if any(row["guidance"] == name for row in rows):
            continue
        with tempfile.TemporaryDirectory() as work:
            ladder = Ladder.create(Path(work) / "ladder", **arguments)
            cost, best = ladder.cost("cpu"), len(ladder.levels)
            plan = Path(work) / "plan.json"
            write_plan(plan, single_level(best, best, STEPS), ladder.digest, "dpm++")
            options = ["--ladder", str(ladder.folder), "--solver", "dpm++", "--plan", str(plan)]
            images, label, _ = generate(num, options)
            alone = float(cost[[level.name for level in ladder.levels].index("large")])
        features, classes = seen(judge, images)
        accuracy = float((classes == label.numpy()).mean())
        row = {"guidance": name, "accuracy": accuracy, "frechet": frechet(features, test)}
        rows.append(row | {"evaluations": float(cost[-1]) / alone})
        print(rows[-1], flush=True)
        out.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
