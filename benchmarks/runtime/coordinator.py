"""The limit of one coordinator, and the memory of driver and coordinator against the number of images.

python benchmarks/runtime/coordinator.py --num 1e4,1e5,1e6 --out benchmarks/results/runtime-coordinator.json

A ladder of three Gaussian levels of 4x4 images, which cost next to nothing: what is left is the runtime.
"""

import json
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from processes import SCRIPT, cpu_seconds

from mlem_dist.ladder.save import save_ladder, save_level
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.solver.process import BetaProcess

SIDE, CLASSES, LEVELS = 4, 10, 3


def make_ladder(folder: Path) -> None:
    """Three Gaussians of random classes."""
    folder.mkdir()
    x0 = torch.randn(2000, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    label = torch.arange(len(x0)) % CLASSES
    scheduler = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    process = BetaProcess(scheduler)
    levels = []
    for k in range(1, LEVELS + 1):
        level = GaussianLevel(CLASSES, SIDE * SIDE, 2 * k, process)
        level.fit(x0, label)
        entry = save_level(folder, f"gaussian-{k}", level, torch.float32)
        levels.append(replace(entry, seconds={"cpu": 1e-6 * 4**k}, denoising_error=[0.1]))
    save_ladder(folder, "dry", (1, SIDE, SIDE), [str(c) for c in range(CLASSES)], scheduler, levels)


def process_of(title: str) -> int | None:
    """The process whose command line begins so."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                return int(path.parent.name)
        except OSError:
            continue
    return None


def resident(pid: int | None) -> float:
    """MiB of memory."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0


def run(ladder: Path, num: int, placement: str, devices: int) -> dict[str, Any]:
    """One run, with the memory of driver and coordinator every half second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [SCRIPT, "generate", "--num", str(num), "--ladder", str(ladder), "--out", f"{folder}/out"]
        command += ["--steps", "20", "--nfe", "5", "--placement", placement, "--devices", str(devices)]
        command += ["--address", "local", "--solver", "sde", "--block-size", "100", "--shard-size", "5000", "--json"]
        memory: list[tuple[float, float]] = []
        used: list[tuple[float, float]] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            coordinator = None
            while driver.poll() is None:
                coordinator = coordinator or process_of("ray::Coordinator")
                memory.append((resident(driver.pid), resident(coordinator)))
                used.append((time.monotonic(), cpu_seconds(coordinator).get(coordinator, 0.0) if coordinator else 0.0))
                time.sleep(0.5)
            assert driver.stdout
            report = json.loads(driver.stdout.read())
    begun = [both for both in memory if both[1]]
    # Without its start, of some seconds; at the end it cannot be asked any more.
    spent = [both for both in used if both[1]]
    spent = spent[len(spent) // 4 :]
    share = (spent[-1][1] - spent[0][1]) / (spent[-1][0] - spent[0][0])
    calls = sum(pool["calls"] for pool in report["pools"])
    result = {
        "placement": placement,
        "num": num,
        "sampling_seconds": report["sampling_seconds"],
        "blocks_per_second": num / 100 / report["sampling_seconds"],
        "calls_per_second": calls / report["sampling_seconds"],
        "coordinator_cores": share,
        "coordinator_ms_per_call": share * report["sampling_seconds"] * 1e3 / calls,
        "driver_mib": [begun[len(begun) // 4][0], max(both[0] for both in begun)],
        "coordinator_mib": [begun[len(begun) // 4][1], max(both[1] for both in begun)],
    }
    print(result, flush=True)
    return result


@click.command()
@click.option("--num", default="1e4,1e5,1e6")
@click.option("--devices", default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(num: str, devices: int, out: Path) -> None:
    """Memory is MiB, after a quarter of the run and at most."""
    with tempfile.TemporaryDirectory() as folder:
        ladder = Path(folder) / "dry"
        make_ladder(ladder)
        nums = [int(float(images)) for images in num.split(",")]
        runs = [run(ladder, images, "together", devices) for images in nums]
        runs += [run(ladder, images, "pools", devices) for images in nums]
    out.write_text(json.dumps({"machine": f"{platform.machine()}, {devices} cores", "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
