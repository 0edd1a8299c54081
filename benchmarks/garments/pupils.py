"""Recognisers trained on generated images only, and tested on real ones, for scales of guidance and budgets.

python benchmarks/garments/pupils.py --data DATA --work WORK --out benchmarks/results/garments-pupils.json

`mlem-dist generate` makes images of the captions of DATA's training part, with `--guidance` and `--nfe`, into WORK. A
recogniser is trained on each dataset as it is, by what the captions' scenes contain, and on as many real images. Its
score is the share of what it tells right about the real images of the validation part. Lines that OUT has are kept.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from parts import read
from recogniser import look, targets, train

SCRIPT = str(Path(sys.executable).with_name("mlem-dist"))

SCALES = (1.0, 2.0, 4.0)

BUDGETS = (3, 5, 10)
"""Budgets of bundled plans, in evaluations of the best level. The plans were tuned for guidance 3."""

KINDS = ("layout", "background", "kind", "colour", "pattern")
"""Attributes of the recogniser's first heads, in their order."""


def generate(prompts: Path, out: Path, scale: float, nfe: int) -> None:
    """Generate a dataset, or finish it."""
    command = [SCRIPT, "generate", "--ladder", "garments", "--prompts", str(prompts), "--out", str(out)]
    options = ["--guidance", str(scale), "--nfe", str(nfe), "--precision", "bfloat16", "--engine", "inline"]
    subprocess.run([*command, *options], check=True)


def scores(folder: Path, num: int, steps: int, real: tuple[torch.Tensor, np.ndarray]) -> dict[str, float]:
    """Shares of right answers on real images, by a recogniser that is trained on a folder's images.

    `real` has the images and their `targets`.
    """
    images, captions, rows = read(folder, "train", num)
    _, seen = look(train(images, targets(captions, rows), steps), real[0])
    right, known = seen == real[1], real[1] >= 0
    lines = {kind: float(right[:, head].mean()) for head, kind in enumerate(KINDS)}
    return {"right": float(right[known].mean()), **lines}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--num", default=10_000, show_default=True, help="Images that each recogniser is trained on.")
@click.option("--steps", default=1_500, show_default=True, help="Steps that each recogniser is trained for.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, num: int, steps: int, work: Path, out: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    settings = {"machine": platform.machine(), "num": num, "steps": steps}
    kept = json.loads(out.read_text()) if out.exists() else settings | {"rows": []}
    lines = kept.pop("rows")
    if kept != settings:
        raise click.UsageError(f"{out} is of other settings; choose another --out")
    images, captions, rows = read(data, "validation", 10_000)
    real = images, targets(captions, rows).numpy()

    def add(line: dict[str, Any]) -> None:
        click.echo(json.dumps(line))
        lines.append(line)
        out.write_text(json.dumps(settings | {"rows": lines}, indent=1) + "\n")

    prompts = work / f"prompts-{num}.parquet"
    first = min((data / "data").glob("train-*.parquet"))
    table = pq.read_table(first).drop_columns(["image"])
    if table.num_rows < num:
        raise click.UsageError(f"--num {num}: {first} has {table.num_rows} captions only")
    pq.write_table(table.slice(0, num), prompts)
    for scale, nfe in [(scale, nfe) for nfe in BUDGETS for scale in SCALES]:
        if any((line.get("guidance"), line.get("nfe")) == (scale, nfe) for line in lines):
            continue
        folder = work / f"{num}-{scale:g}-{nfe}"
        generate(prompts, folder, scale, nfe)
        add({"guidance": scale, "nfe": nfe} | scores(folder, num, steps, real))
    if not any(line.get("real") for line in lines):
        add({"real": True} | scores(data, num, steps, real))


if __name__ == "__main__":
    main()
