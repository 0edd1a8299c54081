"""What ladder the paper's estimator would gain on: the prediction of calibration for smaller increments and costs.

python benchmarks/frontier/what_ladder.py --out benchmarks/results/frontier/what_ladder.json

From the effects that calibration has measured on `fashion`: those of all networks above the first are multiplied by a
factor, as if each knew the best level's answer better, and the times of all levels but the best divided by another.
"""

import json
from pathlib import Path

import click
import numpy as np

from mlem_dist.ladder.calibration import read_effect
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.neyman import nfe_at_error, rung_sets

SMALLER = (1, 1 / 2, 1 / 4, 1 / 8)
CHEAPER = (1, 3, 10)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """Time of Euler-Maruyama over that of ML-EM at its error, to first order."""
    ladder = Ladder.load("fashion")
    measured = json.loads((ladder.folder / "calibration.json").read_text())
    solvers = next(iter(measured["devices"].values()))["solvers"]
    rows = []
    for solver, found in solvers.items():
        effect = read_effect(ladder, solver)
        assert effect is not None
        for cheaper in CHEAPER:
            cost = ladder.cost("cpu").copy()
            cost[:-1] /= cheaper
            for smaller in SMALLER:
                scale = np.sqrt(np.array([1.0, 1.0] + [smaller] * (len(cost) - 2)))
                products = effect[1] * (scale[:, None] * scale)[:, :, None]
                for row in found["speed_up"]:
                    sets = rung_sets(len(cost))
                    nfe = min(nfe_at_error(products, rungs, cost, row["error"], "closed") for rungs in sets)
                    rows.append({"solver": solver, "cheaper": cheaper, "smaller": smaller})
                    rows[-1] |= {"em_steps": row["em_steps"], "ratio": row["em_steps"] / nfe}
                ratios = [f"{row['ratio']:.2f}" for row in rows[-len(found["speed_up"]) :]]
                print(f"{solver}, costs / {cheaper}, effects x {smaller:g}: {', '.join(ratios)}")
    out.write_text(json.dumps({"ladder": ladder.digest, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
