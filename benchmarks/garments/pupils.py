"""Recognisers trained on generated images only, and tested on real ones, for scales of guidance and budgets.

python benchmarks/garments/pupils.py --data DATA --work WORK --out benchmarks/results/garments-pupils.json

`mlem-dist generate` makes images of the captions of DATA's training part, with `--guidance` and `--nfe`, into WORK: NUM
with the smallest budget, and with each other budget as many as `--nfe` says cost the same; images of guidance 1 take a
third to a half less. Two recognisers learn what the captions of each dataset say, from all of its images and from as
many as the largest budget has. Two more learn from real images and their captions. The score is the share of what a
recogniser tells right about the real images of the validation part. Lines that OUT has are kept.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from parts import read
from recogniser import Said, look, targets, train

SCRIPT = str(Path(sys.executable).with_name("mlem-dist"))

SCALES = (1.0, 2.0, 4.0)

BUDGETS = (3, 5, 10)
"""Budgets of bundled plans, in evaluations of the best level. The plans were tuned for guidance 3."""

KINDS = ("layout", "background", "kind", "colour", "pattern")
"""Attributes of the recogniser's first heads, in their order."""


def told(captions: Sequence[str]) -> torch.Tensor:
    """What captions say, as `targets`: -100 for what they leave unsaid, and for two garments in no order."""
    numbers = []
    for content in map(Said.of, captions):
        unsaid = (-100,) * 3
        items = [[-100 if value is None else value for value in item] for item in content.items]
        first, second = [*items, unsaid][:2] if len(items) == 1 or content.layout is not None else (unsaid, unsaid)
        numbers.append([-100 if content.layout is None else content.layout, content.background, *first, *second])
    return torch.tensor(numbers)


def generate(prompts: Path, out: Path, scale: float, nfe: int, precision: str) -> None:
    """Generate a dataset, or finish it."""
    command = [SCRIPT, "generate", "--ladder", "garments", "--prompts", str(prompts), "--out", str(out)]
    options = ["--guidance", str(scale), "--nfe", str(nfe), "--precision", precision, "--engine", "inline"]
    subprocess.run([*command, *options], check=True)


def scores(folder: Path, num: int, steps: int, real: tuple[torch.Tensor, np.ndarray]) -> dict[str, float]:
    """Shares of right answers on real images, by a recogniser that is trained on a folder's images.

    `real` has the images and their `targets`.
    """
    images, captions, _ = read(folder, "train", num)
    _, seen = look(train(images, told(captions), steps), real[0])
    right, known = seen == real[1], real[1] >= 0
    lines = {kind: float(right[:, head].mean()) for head, kind in enumerate(KINDS)}
    return {"right": float(right[known].mean()), **lines}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--num", default=6_000, show_default=True, help="Images with the smallest budget.")
@click.option("--steps", default=600, show_default=True, help="Steps that each recogniser is trained for.")
@click.option("--precision", default="float32", show_default=True, help="Precision of `generate`.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, num: int, steps: int, precision: str, work: Path, out: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    settings = {"machine": platform.machine(), "num": num, "steps": steps, "precision": precision}
    kept = json.loads(out.read_text()) if out.exists() else settings | {"rows": []}
    lines = kept.pop("rows")
    if kept != settings:
        raise click.UsageError(f"{out} is of other settings; choose another --out")
    images, captions, rows = read(data, "validation", 10_000)
    real = images, targets(captions, rows).numpy()

    def missing(line: dict[str, Any]) -> bool:
        return not any(line.items() <= other.items() for other in lines)

    def add(line: dict[str, Any]) -> None:
        click.echo(json.dumps(line))
        lines.append(line)
        out.write_text(json.dumps(settings | {"rows": lines}, indent=1) + "\n")

    first = min((data / "data").glob("train-*.parquet"))
    table = pq.read_table(first).drop_columns(["image"])
    if table.num_rows < num:
        raise click.UsageError(f"--num {num}: {first} has {table.num_rows} captions only")
    numbers = {nfe: num * BUDGETS[0] // nfe for nfe in BUDGETS}
    for nfe, number in numbers.items():
        prompts = work / f"prompts-{number}.parquet"
        pq.write_table(table.slice(0, number), prompts)
        for scale in SCALES:
            for part in sorted({number, numbers[BUDGETS[-1]]}):
                line = {"guidance": scale, "nfe": nfe, "images": part}
                if missing(line):
                    folder = work / f"{number}-{scale:g}-{nfe}"
                    generate(prompts, folder, scale, nfe, precision)
                    add(line | scores(folder, part, steps, real))
    for part in (num, numbers[BUDGETS[-1]]):
        line = {"guidance": "real", "images": part}
        if missing(line):
            add(line | scores(data, part, steps, real))


if __name__ == "__main__":
    main()
