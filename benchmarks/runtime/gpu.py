"""One GPU: levels with and without CUDA graphs, states on their way, processes in turn, and runs against levels alone.

python benchmarks/runtime/gpu.py --out benchmarks/results/gpu.json
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from ideal import own_seconds
from processes import generated

from mlem_dist.capacity.placement import Devices, parse_placement
from mlem_dist.capacity.planner import Kind, Layout, costs_of, forecast, overheads_of
from mlem_dist.engine.blocks import Blocks
from mlem_dist.engine.job import PRECISIONS, Job
from mlem_dist.engine.worker import Levels
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import seconds_per_sample
from mlem_dist.models.graphs import as_run
from mlem_dist.solver.integrate import integrate
from mlem_dist.tuning.tuned_plans import tuned_plan

STEPS, REPEATS = 250, 20
TURNS, TURN_SECONDS = 3, 3.0
RUNS = {
    "together": ("float32", "together"),
    "pools": ("float32", "pools"),
    "1-3,4-6": ("float32", "1-3,4-6"),
    "in process": ("float32", None),
    "together, bfloat16": ("bfloat16", "together"),
}
"""Precision and placement; none without Ray."""


def typical(run: Callable[[], Any]) -> float:
    """Median seconds of a call that has been made before, the GPU's work included."""
    times = []
    for _ in range(3 + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[3:])


def level_rows(ladder: Ladder, batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Milliseconds of a call of each level, its kernels launched one by one or as a graph."""
    for precision in PRECISIONS:
        for k, level in enumerate(ladder.levels, 1):
            module = ladder.load_level(k, "cuda", precision)
            for batch in batches:
                kernels = seconds_per_sample(module, ladder, "cuda", batch) * batch
                graph = graph_seconds(ladder.source, k, precision, batch) * batch
                row = {"level": level.name, "precision": precision, "batch": batch}
                yield row | {"kernels_ms": kernels * 1e3, "graph_ms": graph * 1e3}


@lru_cache
def graph_seconds(source: str, k: int, precision: str, batch: int) -> float:
    """Per sample, of a ladder's level as a graph."""
    ladder = Ladder.load(source)
    level = as_run(ladder.load_level(k, "cuda", precision), "cuda")
    return seconds_per_sample(level, ladder, "cuda", batch)


@torch.inference_mode()
def transfer_rows(ladder: Ladder, batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Milliseconds that a state takes from the GPU to an array of the process and back, by either kind of memory."""
    for batch in batches:
        x = torch.randn(batch, *ladder.sample_shape, device="cuda")
        array, pinned = x.cpu().numpy(), torch.empty(x.shape, pin_memory=True)

        def staged_out(x: torch.Tensor = x, pinned: torch.Tensor = pinned) -> np.ndarray:
            pinned.copy_(x, non_blocking=True)
            torch.cuda.synchronize()
            return pinned.numpy().copy()

        def staged_in(array: np.ndarray = array, pinned: torch.Tensor = pinned) -> torch.Tensor:
            pinned.numpy()[...] = array
            return pinned.to("cuda", non_blocking=True)

        yield {
            "batch": batch,
            "bytes": x.nbytes,
            "out_ms": typical(lambda x=x: x.cpu().numpy()) * 1e3,
            "out_pinned_ms": typical(staged_out) * 1e3,
            "in_ms": typical(lambda array=array: torch.tensor(array, device="cuda")) * 1e3,
            "in_pinned_ms": typical(staged_in) * 1e3,
        }


def job_of(ladder: Ladder, nfe: float, block_size: int, precision: str) -> Job:
    """DDIM by the plan that is tuned for a budget."""
    plan = tuned_plan(ladder, "ode", STEPS, nfe)
    assert plan
    arguments = ladder.source, ladder.digest, 10**6, tuple(range(10)), "ode", STEPS, plan, 0, block_size, block_size
    return Job(*arguments, "cuda", precision)


def level_seconds(ladder: Ladder, precision: str, batch: int) -> np.ndarray:
    """float64 (K,): of each level, per sample, as a graph."""
    numbers = range(1, len(ladder.levels) + 1)
    return np.array([graph_seconds(ladder.source, k, precision, batch) for k in numbers])


@torch.inference_mode()
def block_rows(ladder: Ladder, batches: tuple[int, ...], budgets: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Milliseconds of a block in one process, from noise to images in memory, and of its levels alone."""
    for precision in PRECISIONS:
        levels = Levels(ladder, "cuda", precision)
        for batch in batches:
            for nfe in budgets:
                job = job_of(ladder, nfe, batch, precision)
                blocks = Blocks(job, ladder)

                def make(job: Job = job, blocks: Blocks = blocks, levels: Levels = levels) -> None:
                    form = blocks.closed_form(0)
                    x = integrate(levels, blocks.table, job.block_plan(0), blocks.noise(0), blocks.condition(0), form)
                    blocks.images(0, x)

                row = {"nfe": nfe, "precision": precision, "batch": batch, "block_ms": typical(make) * 1e3}
                costs = costs_of(ladder, level_seconds(ladder, precision, batch), "cuda")
                every = [range(1, len(ladder.levels) + 1)]
                yield row | {"levels_ms": own_seconds(job, every, costs, job.workload.expected_calls()) * batch * 1e3}


def turn_rows(ladder: Ladder, batch: int) -> Iterator[dict[str, Any]]:
    """Calls per second of the best level in one process, and in two and three that take turns on the GPU."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(TURNS), context.SimpleQueue()
    every = [context.Process(target=_take_turns, args=(n, ladder.source, batch, barrier, found)) for n in range(TURNS)]
    for one in every:
        one.start()
    rates: dict[int, list[float]] = {}
    for _ in range(TURNS * (TURNS + 1) // 2):
        together, rate = found.get()
        rates.setdefault(together, []).append(rate)
    for one in every:
        one.join()
    yield from ({"processes": n, "batch": batch, "calls_per_second": sum(rates[n])} for n in sorted(rates))


@torch.inference_mode()
def _take_turns(number: int, source: str, batch: int, barrier: Any, found: Any) -> None:
    ladder = Ladder.load(source)
    level = as_run(ladder.load_level(len(ladder.levels), "cuda"), "cuda")
    x = torch.randn(batch, *ladder.sample_shape, device="cuda")
    t = torch.zeros(batch, dtype=torch.int64, device="cuda")
    condition = ladder.condition(torch.arange(batch, device="cuda"))
    level(x, t, condition).cpu()
    for together in range(1, TURNS + 1):
        barrier.wait()
        if number < together:
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < TURN_SECONDS:
                level(x, t, condition)
                torch.cuda.synchronize()
                calls += 1
            found.put((together, calls / (time.perf_counter() - start)))


def run_row(
    ladder: Ladder, name: str, nfe: int, block_size: int, num: int, transfers: list[dict[str, Any]]
) -> dict[str, Any]:
    """`mlem-dist generate` as a command."""
    precision, placement = RUNS[name]
    options = ["--device", "cuda", "--solver", "ode", "--nfe", str(nfe), "--block-size", str(block_size)]
    options += ["--ladder", ladder.source, "--precision", precision, "--shard-size", str(10 * block_size)]
    options += ["--placement", placement] if placement else ["--engine", "inline"]
    report, _ = generated(num, *options)
    kept = ("images_per_second", "ready_seconds", "first_block_seconds", "sampling_seconds", "seconds", "busy_seconds")
    row = {"run": name, "nfe": nfe, "batch": block_size, "precision": precision, "num": num}
    row |= {key: report[key] for key in (*kept, "calls_per_sample")}
    costs = costs_of(ladder, level_seconds(ladder, precision, block_size), "cuda")
    job = replace(job_of(ladder, nfe, block_size, precision), num=num)
    pools = parse_placement(placement or "together", len(ladder.levels)).pools
    own = own_seconds(job, pools, costs, np.array([*report["calls_per_sample"].values()]))
    row["of_ideal"] = report["images_per_second"] * own
    if placement:
        kind = Kind("gpu", Devices("cuda", 1), costs, overheads_of("cuda", ladder))
        told = forecast(job.workload, Layout(pools, (kind,) * len(pools)))
        row["forecast_of_measured"] = num / told.seconds / report["images_per_second"]
        moved = sum(pool["moved"] for pool in report["pools"])
        state = next(one for one in transfers if one["batch"] == block_size)
        way = (state["out_ms"] + state["in_ms"]) / 2e3 / state["bytes"]
        row |= {"moved_bytes": moved, "moving": moved * way / report["sampling_seconds"]}
    return row


@click.command()
@click.option("--ladder", "name", default="fashion")
@click.option("--num", default=500_000, help="Images of a run.")
@click.option("--batches", default="100,500,1000")
@click.option("--block-size", default=500, help="Of a run.")
@click.option("--nfe", default="5,10,20")
@click.option("--run", "names", type=click.Choice(list(RUNS)), multiple=True, default=list(RUNS))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(name: str, num: int, batches: str, block_size: int, nfe: str, names: tuple[str, ...], out: Path) -> None:
    """Everything, written as it comes."""
    ladder = Ladder.load(name)
    sizes, budgets = tuple(map(int, batches.split(","))), tuple(map(int, nfe.split(",")))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["ladder"] = ladder.digest
    parts = {
        "levels": level_rows(ladder, sizes),
        "transfers": transfer_rows(ladder, sizes),
        "blocks": block_rows(ladder, sizes, budgets),
        "turns": turn_rows(ladder, block_size),
        "runs": (run_row(ladder, name, budgets[-1], block_size, num, result["transfers"]) for name in names),
    }
    for part, rows in parts.items():
        result[part] = []
        for row in rows:
            result[part].append(row)
            print(json.dumps(row, default=float), flush=True)
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
