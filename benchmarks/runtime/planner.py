"""The planner against measured runs, and what it says of clusters from 1 to 4,096 devices.

python benchmarks/runtime/ray_share.py --out benchmarks/results/ray_share.json
python benchmarks/runtime/planner.py --out benchmarks/results

Writes planner.json and planner.png. On two cores that both sample, Ray's own processes, the coordinator, the writer and
the driver take some of them, which the first command measures and the forecast takes off.
"""

import json
import multiprocessing
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
import numpy as np
import torch
from ideal import own_seconds
from processes import generated
from ray.cluster_utils import Cluster
from torch import Tensor

from mlem_dist.capacity.placement import Devices, parse_placement
from mlem_dist.capacity.planner import OVERHEADS, Kind, Layout, costs_of, forecast
from mlem_dist.engine.blocks import Blocks
from mlem_dist.engine.job import Job
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import seconds_per_sample
from mlem_dist.runtime.cluster import QUIET_ENVIRONMENT
from mlem_dist.solver.integrate import Drift, integrate
from mlem_dist.solver.plan import Plan, Recipe
from mlem_dist.tuning.recipes import make_recipe
from mlem_dist.tuning.tuned_plans import tuned_plan

STEPS, SHARD, CORES = 250, 600, 2
SETTLED_SECONDS = 20
"""After its start Ray goes on to load things for a while, which a planner of clusters is not asked about."""

SAMPLES = 200
"""For the times of levels that are called in the order of a block's steps."""

# Solver, placement, evaluations of the best level, block size, devices, images.
RUNS = [
    ("sde", "together", 10, 100, 2, 8000),
    ("sde", "together", 5, 50, 2, 3000),
    ("sde", "together", 20, 100, 2, 1200),
    ("sde", "together", 10, 100, 1, 800),
    ("sde", "1-3,4-6", 10, 100, 2, 1800),
    ("sde", "1-2,3-6", 5, 100, 2, 3000),
    ("sde", "1-5,6", 10, 50, 2, 1800),
    ("sde", "pools", 10, 100, 2, 1200),
    ("sde", "pools", 10, 50, 2, 1200),
    ("ode", "together", 10, 100, 2, 14000),
]
KEPT = ("ready_seconds", "first_block_seconds", "sampling_seconds", "calls_per_sample", "pools")
DEVICES = [4**i for i in range(7)]
CELLS = {16: "cells of up to 16", 64: "cells of up to 64", 4096: "one coordinator", None: "cells as planned"}
"""By the most devices of a cell."""


def make_job(
    ladder: Ladder, cost: np.ndarray, solver: str, nfe: float, block: int, num: int, shard: int, device: str
) -> Job:
    """With held increments for the SDE, and for the ODE the plan that the ladder has for this budget."""
    plan: Plan | Recipe | None
    if solver == "sde":
        plan = make_recipe(ladder, cost, solver, STEPS, nfe, increments="held")
    else:
        plan = tuned_plan(ladder, solver, STEPS, nfe)
        assert plan, f"no plan is tuned for {nfe} evaluations"
    labels = tuple(range(10))
    return Job("fashion", ladder.digest, num, labels, solver, STEPS, plan, 0, block, shard, device)


def measure(
    address: str, solver: str, placement: str, nfe: float, block: int, devices: int, num: int
) -> dict[str, Any]:
    """One run's report, on the Ray at `address`."""
    options = ["--address", address, "--placement", placement, "--devices", str(devices), "--nfe", str(nfe)]
    options += ["--block-size", str(block), "--shard-size", str(SHARD), "--steps", str(STEPS), "--solver", solver]
    options += ["--increments", "held"] if solver == "sde" else []
    return generated(num, *options)[0]


def level_times(job: Job, cores: int) -> tuple[np.ndarray, float]:
    """Seconds per sample of each level, on one core while so many are busy with the same, float64 (2, K).

    First when a level is called again and again, then when they are called in the order of a block's steps. And the
    share of a block's time that is levels' time, which is known better than either: both are of the same moment.
    """
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        times, shares = zip(*pool.map(own_level_times, [job] * cores), strict=True)
    return np.mean(times, axis=0), float(np.mean(shares))


def own_level_times(job: Job) -> tuple[list[list[float]], float]:
    """Of this process; a level that the block does not call has the first time twice."""
    ladder = Ladder.load("fashion")
    numbers = range(1, len(ladder.levels) + 1)
    levels = {k: ladder.load_level(k, "cpu") for k in numbers}
    alone = [seconds_per_sample(levels[k], ladder, "cpu", job.block_size) for k in numbers]
    torch.set_num_threads(1)
    calls: Counter[int] = Counter()
    used: Counter[int] = Counter()

    def timed(number: int) -> Drift:
        def call(x: Tensor, *about: Tensor) -> Tensor:
            began = time.thread_time_ns()
            out: Tensor = levels[number](x, *about)
            used[number] += time.thread_time_ns() - began
            calls[number] += 1
            return out

        return call

    timed_levels = {k: timed(k) for k in numbers}
    blocks = Blocks(job, ladder)
    # What all blocks share is made once.
    blocks.closed_form(0)
    began = time.thread_time_ns()
    for block in range(-(-SAMPLES // job.block_size)):
        plan, closed_form = job.block_plan(block), blocks.closed_form(block)
        x = integrate(timed_levels, blocks.table, plan, blocks.noise(block), blocks.condition(block), closed_form)
        blocks.images(block, x)
    share = sum(used.values()) / (time.thread_time_ns() - began)
    in_turn = [used[k] / calls[k] / job.block_size / 1e9 if calls[k] else alone[k - 1] for k in numbers]
    return [alone, in_turn], share


def validate(
    address: str, ladder: Ladder, runs: Sequence[tuple[str, str, float, int, int, int]]
) -> Iterator[dict[str, Any]]:
    """Runs measured, each between two measurements of the levels' times."""
    for solver, placement, nfe, block, devices, num in runs:
        row: dict[str, Any] = {"solver": solver, "placement": placement, "nfe": nfe, "block_size": block}
        row |= {"devices": devices, "num": num}
        job = make_job(ladder, ladder.cost("cpu"), solver, nfe, block, num, SHARD, "cpu")
        before, share = level_times(job, devices)
        report = measure(address, solver, placement, nfe, block, devices, num)
        after, share_after = level_times(job, devices)
        alone, in_turn = (before + after) / 2
        row |= {"cost": alone.tolist(), "cost_in_turn": in_turn.tolist(), "measured": report["images_per_second"]}
        row["levels_of_block"] = (share + share_after) / 2
        yield row | {key: report[key] for key in KEPT}


def add_forecast(row: dict[str, Any], ladder: Ladder, taken: float) -> None:
    """What the planner says of a run, with the levels' times measured around it.

    Where every core samples, without and with the cores `taken` by others.
    """
    nfe, block, devices, num = (row[key] for key in ("nfe", "block_size", "devices", "num"))
    # The plan is that of the run, which goes by the ladder's costs; its time is by those measured now.
    job = make_job(ladder, ladder.cost("cpu"), row["solver"], nfe, block, num, SHARD, "cpu")
    pools = parse_placement(row["placement"], len(ladder.levels)).pools
    for name, share in (("forecast_of_free_cores", 0.0), ("forecast", taken / CORES if devices == CORES else 0.0)):
        costs = costs_of(ladder, np.array(row["cost"]) / (1 - share), "cpu")
        kind = Kind("cpu", Devices("cpu", devices), costs, OVERHEADS["cpu"])
        row[name] = num / forecast(job.workload, Layout(pools, (kind,) * len(pools))).seconds
        row[f"ratio{name.removeprefix('forecast')}"] = row[name] / row["measured"]
    calls = np.array(list(row["calls_per_sample"].values()))
    alone = np.array(row["cost"])
    own = {
        "to_ideal": own_seconds(job, pools, costs_of(ladder, alone, "cpu"), calls),
        # As they are called, with what they share.
        "to_ideal_in_turn": float(calls @ np.array(row["cost_in_turn"])),
        # Without: each call as long as alone.
        "to_ideal_by_calls": float(calls @ alone),
    }
    row |= {ideal: row["measured"] * seconds / devices for ideal, seconds in own.items()}
    at_work = sum(pool["busy"] for pool in row["pools"]) / row["sampling_seconds"] / devices
    row["actors_at_work"] = at_work
    if row["placement"] == "together":
        # Elsewhere actors are also at work on what they send each other.
        row["levels_at_work"] = at_work * row["levels_of_block"]
    print(
        {key: value if isinstance(value, str) else round(value, 3) for key, value in row.items() if np.isscalar(value)}
    )


def scale(ladder: Ladder, cost: np.ndarray) -> list[dict[str, Any]]:
    """Devices of two kinds, all levels together and one pool per level, by the most devices of a cell."""
    rows = []
    for name, device, speed, block in (("CPU cores", "cpu", 1, 100), ("GPUs, 50 times a core", "cuda", 50, 500)):
        for placement in ("together", "pools"):
            for cell in CELLS:
                # One coordinator of more devices with a pool per level is saturated long before.
                for devices in DEVICES if placement == "together" or cell != 4096 else DEVICES[:5]:
                    costs = costs_of(ladder, cost / speed, device)
                    kind = Kind(device, Devices(device, devices), costs, OVERHEADS[device])
                    job = make_job(ladder, cost, "sde", 10, block, 10**9, 20 * block, device)
                    pools = parse_placement(placement, len(ladder.levels)).pools
                    found = forecast(job.workload, Layout(pools, (kind,) * len(pools)), cell)
                    row = {"devices": devices, "kind": name, "placement": placement, "cell": cell}
                    row |= {"cell_devices": found.cell_devices}
                    row |= {"images_per_second": found.images_per_second, "efficiency": found.efficiency}
                    row |= {"coordinator": found.coordinator}
                    rows.append(row)
                    print(row, flush=True)
    return rows


def draw(validation: list[dict[str, Any]], scaling: list[dict[str, Any]], path: Path) -> None:
    """Forecast against measured, and efficiency against devices."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    measured, expected = ([row[key] for row in validation] for key in ("measured", "forecast"))
    axes[0].loglog(measured, expected, "o")
    ends = [min(measured) * 0.9, max(measured) * 1.1]
    axes[0].fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], alpha=0.2, label="within 10 %")
    axes[0].set(xlabel="measured images/s, two CPU cores", ylabel="forecast", title="the planner against measured runs")
    axes[0].legend()
    for one, kind in zip(axes[1:], dict.fromkeys(row["kind"] for row in scaling), strict=True):
        for index, placement in enumerate(("together", "pools")):
            for (cell, label), line in zip(CELLS.items(), (":", "-", "--", "-."), strict=True):
                rows = [
                    row for row in scaling if (row["kind"], row["placement"], row["cell"]) == (kind, placement, cell)
                ]
                x, y = ([row[key] for row in rows] for key in ("devices", "efficiency"))
                one.loglog(x, y, line, marker=".", color=f"C{index}", label=f"{placement}, {label}")
        one.set(xlabel="devices", ylabel="images/s to the levels' own time", title=f"simulated: {kind}")
        one.axhline(0.9, color="k", lw=0.5)
        one.legend(fontsize=8)
    for one in axes:
        one.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--most", default=len(RUNS), help="Measure at most so many further runs.")
@click.option("--scaling/--no-scaling", default=True, help="Simulate large clusters.")
def main(out: Path, most: int, scaling: bool) -> None:
    """A rerun measures what has not been measured, and forecasts all of it again."""
    ladder = Ladder.load("fashion")
    path = out / "planner.json"
    taken = json.loads((out / "ray_share.json").read_text())["cores_beside_sampling"]
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"validation": []}
    result["machine"] = f"{platform.machine()}, {CORES} cores"
    done = len(result["validation"])
    if todo := RUNS[done : done + most]:
        # As the program itself starts it where it is not told of one.
        os.environ |= QUIET_ENVIRONMENT
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CORES, "include_dashboard": False})
        try:
            time.sleep(SETTLED_SECONDS)
            for row in validate(cluster.address, ladder, todo):
                result["validation"].append(row)
                path.write_text(json.dumps(result, indent=1) + "\n")
        finally:
            cluster.shutdown()
    for row in result["validation"]:
        add_forecast(row, ladder, taken)
    if scaling:
        result["scaling"] = scale(ladder, ladder.cost("cpu"))
    path.write_text(json.dumps(result, indent=1) + "\n")
    if result["validation"] and "scaling" in result:
        draw(result["validation"], result["scaling"], out / "planner.png")


if __name__ == "__main__":
    main()
