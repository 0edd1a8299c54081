"""How much of each family's error is bias: the same noises, many draws of the plan.

python benchmarks/frontier/bias.py --out benchmarks/results/frontier/bias.json

For a sample whose noise and Brownian path are fixed, the end is a random variable of the plan. Its mean squared error
to the best level's end is variance over plans plus squared bias; the squared bias is estimated from the mean of the
draws, less the draws' variance over their number. `shift` is the squared bias of the mean image of all samples, which
no number of images averages away. A plan that is the same for all has no variance: its whole error is bias. A rerun
goes on where the last one stopped.
"""

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import Plan, read_plan, single_level, switched
from mlem_dist.tuning.comparison import BLOCK, PlanComparison
from mlem_dist.tuning.recipes import make_recipe
from mlem_dist.tuning.tune import FAMILIES, TEST_SEED
from mlem_dist.tuning.tuned_plans import plan_path

STEPS = 250
DRAWN = FAMILIES | {"ML-EM, systematic": {"increments": "impulse"}}

SMALL, STITCH_STEPS = 3, 25
"""T-Stitch: the level that it begins with, and the steps, of which so many are the best level's as the budget pays."""


def fixed(ladder: Ladder, solver: str, nfe: int) -> Iterator[tuple[str, Plan]]:
    """Plans that are the same for all samples, at the budget or a little below."""
    levels, cost = len(ladder.levels), ladder.cost("cpu")
    yield "Euler-Maruyama", single_level(levels, levels, nfe)
    small = next(s for s in range(STITCH_STEPS) if switched(SMALL, levels, levels, STITCH_STEPS, s).nfe(cost) <= nfe)
    yield "T-Stitch", switched(SMALL, levels, levels, STITCH_STEPS, small)
    tuned = plan_path(ladder.folder, solver, nfe)
    if tuned.exists():
        yield "tuned", read_plan(tuned, ladder.digest, len(ladder.levels), solver, STEPS)


def bias(ends: Tensor, reference: Tensor) -> dict[str, float]:
    """Of draws (D, B, C, H, W) that end at `reference` (B, C, H, W) but for their error."""
    off = (ends - reference).double()
    # The samples of a draw share its plan, so that their mean has a variance over draws of its own.
    noise, of_mean = (float(one.var(0).mean()) / len(off) if len(off) > 1 else 0.0 for one in (off, off.mean(1)))
    error, squared = float(off.square().mean()), float(off.mean(0).square().mean()) - noise
    shift = float(off.mean((0, 1)).square().mean()) - of_mean
    return {"error": error, "squared_bias": squared, "share": squared / error, "shift": shift}


@click.command()
@click.option("--nfe", default=10)
@click.option("--draws", default=24)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(nfe: int, draws: int, out: Path) -> None:
    """One block of 32 samples per solver."""
    ladder = Ladder.load("fashion")
    about: dict[str, Any] = {"machine": platform.machine(), "ladder": ladder.digest}
    about |= {"nfe": nfe, "steps": STEPS, "draws": draws, "samples": BLOCK["cpu"]}
    kept = json.loads(out.read_text()) if out.exists() else about | {"rows": []}
    rows = kept.pop("rows")
    if kept != about:
        raise click.UsageError(f"{out} is of other options than these; choose another --out")
    for solver in ("sde", "ode"):
        judge = PlanComparison(ladder, solver, "cpu", STEPS, BLOCK["cpu"], TEST_SEED)
        plans = {family: [plan] for family, plan in fixed(ladder, solver, nfe)}
        for family, choices in DRAWN.items():
            recipe = make_recipe(ladder, ladder.cost("cpu"), solver, STEPS, nfe, **choices)
            plans[family] = [recipe.plan(np.random.default_rng(d)) for d in range(draws)]
        for family, drawn in plans.items():
            if any((row["solver"], row["family"]) == (solver, family) for row in rows):
                continue
            ends = torch.stack([judge.end(plan, 0) for plan in drawn])
            rows.append({"solver": solver, "family": family} | bias(ends, judge.reference))
            print(rows[-1], flush=True)
            out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
