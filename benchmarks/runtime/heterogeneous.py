"""Two devices, of which one has no room for the best level: pools against what plain data parallelism can use.

python benchmarks/runtime/heterogeneous.py --num 1500 --out benchmarks/results/heterogeneous.json

Two Ray nodes of one core each on this machine, labelled small and large. Data parallelism needs every level on each
device, so it has the large one alone; pools put the lower levels on the small one.
"""

import json
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
from processes import generated
from ray.cluster_utils import Cluster

from mlem_dist.capacity.placement import Devices, parse_placement
from mlem_dist.capacity.planner import OVERHEADS, Kind, Layout, costs_of, forecast
from mlem_dist.engine.job import Job
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import seconds_per_sample
from mlem_dist.tuning.recipes import make_recipe

STEPS, BLOCK, SHARD = 250, 50, 500
PLACEMENTS = ("1-6@size=large", "1-5@size=small,6@size=large")


def measured(address: str, placement: str, num: int, nfe: float) -> float:
    """Images per second after loading."""
    options = ["--address", address, "--placement", placement, "--nfe", str(nfe), "--block-size", str(BLOCK)]
    options += ["--shard-size", str(SHARD), "--solver", "sde", "--steps", str(STEPS), "--increments", "held"]
    report, _ = generated(num, *options)
    return float(report["images_per_second"])


@click.command()
@click.option("--num", default=1500)
@click.option("--nfe", default=5.0)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(num: int, nfe: float, out: Path) -> None:
    """Measured, and by the planner from the levels' times of this machine."""
    ladder = Ladder.load("fashion")
    levels = [ladder.load_level(k, "cpu") for k in range(1, len(ladder.levels) + 1)]
    alone = np.array([seconds_per_sample(level, ladder, "cpu", BLOCK) for level in levels])
    costs = costs_of(ladder, alone, "cpu")
    recipe = make_recipe(ladder, ladder.cost("cpu"), "sde", STEPS, nfe, increments="held")
    job = Job("fashion", ladder.digest, num, tuple(range(10)), "sde", STEPS, recipe, 0, BLOCK, SHARD, "cpu")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for size in ("small", "large"):
        cluster.add_node(num_cpus=1, labels={"size": size})
    rows: list[dict[str, Any]] = []
    try:
        for placement in PLACEMENTS:
            parsed = parse_placement(placement, len(ladder.levels))
            kinds = {name: Kind(name, Devices("cpu", 1), costs, OVERHEADS["cpu"]) for name in parsed.kinds}
            found = forecast(job.workload, Layout(parsed.pools, tuple(kinds[name] for name in parsed.kinds)))
            rate = measured(cluster.address, placement, num, nfe)
            rows.append({"placement": placement, "measured": rate, "forecast": num / found.seconds})
            print(rows[-1], flush=True)
    finally:
        cluster.shutdown()
    gain = {key: rows[1][key] / rows[0][key] for key in ("measured", "forecast")}
    print(gain)
    result = {"machine": f"{platform.machine()}, two cores", "num": num, "nfe": nfe, "rows": rows, "gain": gain}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
