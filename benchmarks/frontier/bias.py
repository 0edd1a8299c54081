"""How much of each family's error is bias: the same noises, many draws of the plan.

python benchmarks/frontier/bias.py --out benchmarks/results/frontier/bias.json

For a sample whose noise and Brownian path are fixed, the end is a random variable of the plan. Its mean squared error
to the best level's end is variance over plans plus squared bias; the squared bias is estimated from the mean of the
draws, less the draws' variance over their number. `shift` is the squared bias of the mean image of all samples, which
no number of images averages away.
"""

import json
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.judge import BLOCK, Judge
from mlem_dist.tuning.recipe import make_recipe
from mlem_dist.tuning.tune import JUDGING_SEED

STEPS = 250
FAMILIES: dict[str, dict[str, Any]] = {
    "ML-EM": {"increments": "impulse", "draw": "independent"},
    "ML-EM, systematic": {"increments": "impulse", "draw": "systematic"},
    "held": {"increments": "held"},
    "extrapolated": {"increments": "extrapolated"},
}


@click.command()
@click.option("--nfe", default=10.0)
@click.option("--draws", default=24)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(nfe: float, draws: int, out: Path) -> None:
    """One block of 32 samples per solver."""
    ladder = Ladder.load("fashion")
    rows = []
    for solver in ("ddpm", "ddim"):
        judge = Judge(ladder, solver, "cpu", STEPS, BLOCK, JUDGING_SEED)
        for family, choices in FAMILIES.items():
            recipe = make_recipe(ladder, "cpu", solver, STEPS, nfe, **choices)
            ends = torch.stack([judge.end(recipe.plan(np.random.default_rng(d)), 0) for d in range(draws)])
            off = (ends - judge.reference).double()
            noise = off.var(0).mean() / draws
            shift = off.mean((0, 1)).square().mean() - noise / BLOCK
            row = {
                "solver": solver,
                "family": family,
                "error": float(off.square().mean()),
                "squared_bias": float(off.mean(0).square().mean() - noise),
                "shift": float(shift),
            }
            row["share"] = row["squared_bias"] / row["error"]
            rows.append(row)
            print(row, flush=True)
    result = {"machine": platform.machine(), "ladder": ladder.digest, "nfe": nfe, "steps": STEPS, "draws": draws}
    out.write_text(json.dumps(result | {"samples": BLOCK, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
