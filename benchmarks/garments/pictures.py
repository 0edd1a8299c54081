"""Pictures of the ladder `garments`: images of eight captions for several budgets, beside those of the guided ODE.

python benchmarks/garments/pictures.py --data DATA --out docs

DATA is written by composites.py. `garments.png` has captions of the validation part, `garments-held-out.png` those of
the test part, whose combinations of garment and colour the training part does not have.
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib
import numpy as np
from matplotlib import pyplot
from parts import read
from race import REFERENCE_STEPS

import mlem_dist
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import single_level

CAPTIONS, SEEDS = 8, 8
"""Number of captions in a picture, and of images of each."""

BUDGETS = (3, 5, 10, 20)


def sheet(images: np.ndarray) -> np.ndarray:
    """Images (captions * seeds, H, W, 3) as one, with a row for each caption."""
    _, height, width, channels = images.shape
    grid = images.reshape(CAPTIONS, SEEDS, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(CAPTIONS * height, SEEDS * width, channels)


def picture(ladder: Ladder, captions: list[str], out: Path) -> None:
    """Write the picture of some captions."""
    prompts = [caption for caption in captions for _ in range(SEEDS)]
    best = len(ladder.levels)
    panels = {f"{budget} evaluations": mlem_dist.sample(ladder, prompts=prompts, nfe=budget) for budget in BUDGETS}
    reference = single_level(best, best, REFERENCE_STEPS)
    panels["guided ODE"] = mlem_dist.sample(ladder, prompts=prompts, plan=reference, solver="dpm++")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels) + 2.2, 3.4), layout="constrained")
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        axis.imshow(sheet(images))
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    height = panels["guided ODE"].shape[1]
    axes[0].set_yticks([(row + 0.5) * height for row in range(CAPTIONS)], captions, fontsize=8, wrap=True)
    axes[0].tick_params(length=0)
    figure.savefig(out, dpi=160)
    click.echo(out)


@click.command()
@click.option("--ladder", "name", default="garments", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the pictures.")
def main(name: str, data: Path, out: Path) -> None:
    """Write both pictures."""
    matplotlib.use("agg")
    ladder = Ladder.load(name)
    for part, file in (("validation", "garments.png"), ("test", "garments-held-out.png")):
        _, captions, _ = read(data, part, CAPTIONS)
        picture(ladder, captions, out / file)


if __name__ == "__main__":
    main()
