"""The same images by other means: Ray Data around the in-process sampler, and Ray Data around one diffusers model.

python benchmarks/runtime/peers.py --num 3000 --out benchmarks/results/peers.json

Each way is a function that a user would write, run in a process of its own on the same cores; its rate is of the whole
run but for starting Ray and importing. Lines of user code are those of the function and the class that it needs.
"""

import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from processes import watched

LADDER, BLOCK, NFE, STEPS = "fashion", 100, 10, 250


class Sampler:
    """ML-EM in the process of a Ray Data actor."""

    def __init__(self) -> None:
        import torch

        from mlem_dist.ladder.ladder import Ladder
        from mlem_dist.solver.closed_form import ClosedForm
        from mlem_dist.solver.steps import solver_table
        from mlem_dist.tuning.tuned_plans import tuned_plan

        torch.set_num_threads(1)
        ladder = Ladder.load(LADDER)
        self.shape = ladder.sample_shape
        self.levels = {k: ladder.load_level(k, "cpu") for k in range(1, len(ladder.levels) + 1)}
        self.table = solver_table(ladder.process, STEPS, "ode")
        self.plan = tuned_plan(ladder, "ode", STEPS, NFE)
        affine = self.levels[1].affine(self.table.t)
        self.closed_form = lambda label: ClosedForm(affine, self.table, label)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        import torch

        from mlem_dist.solver.integrate import integrate
        from mlem_dist.solver.noise import image_noise

        ids = batch["id"]
        label = torch.tensor(ids % 10)
        with torch.inference_mode():
            noise = image_noise(ids.tolist(), self.shape, "cpu")
            x = integrate(self.levels, self.table, self.plan, noise, {"label": label}, self.closed_form(label))
        return {"id": ids, "label": ids % 10, "image": as_png(x.numpy())}


class Diffusers:
    """The best level alone, by a scheduler of diffusers."""

    def __init__(self, kind: str, options: dict[str, Any], steps: int) -> None:
        import diffusers
        import torch

        from mlem_dist.ladder.ladder import Ladder

        torch.set_num_threads(1)
        ladder = Ladder.load(LADDER)
        self.shape, self.steps = ladder.sample_shape, steps
        self.model = ladder.load_level(len(ladder.levels), "cpu")
        self.scheduler = lambda: getattr(diffusers, kind).from_config(dict(ladder.scheduler), **options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        import torch

        ids = batch["id"]
        condition = {"label": torch.tensor(ids % 10)}
        scheduler = self.scheduler()
        scheduler.set_timesteps(self.steps)
        with torch.inference_mode():
            x = torch.randn(len(ids), *self.shape)
            for t in scheduler.timesteps:
                x = scheduler.step(self.model(x, t.expand(len(ids)), condition), t, x).prev_sample
        return {"id": ids, "label": ids % 10, "image": as_png(x.numpy())}


def as_png(x: np.ndarray) -> list[bytes]:
    """PNG files of values in [-1, 1]."""
    from mlem_dist.dataset.shards import PNG

    return PNG.files(((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1))


def ray_data(num: int, out: str, cores: int, kind: type, arguments: dict[str, Any]) -> float:
    """A pool of actors that each map batches of ids to images, written as Parquet; seconds."""
    import ray

    began = time.monotonic()
    # Half a core each, on paper: actors that take whole ones leave none to read and write with, and nothing moves.
    found = ray.data.range(num, override_num_blocks=num // BLOCK).map_batches(
        kind, fn_constructor_kwargs=arguments, batch_size=BLOCK, concurrency=cores, num_cpus=0.5
    )
    found.write_parquet(out)
    return time.monotonic() - began


def ours(num: int, out: str, cores: int, engine: str) -> float:
    """The command line; seconds of loading and sampling, from its report."""
    script = Path(sys.executable).with_name("mlem-dist")
    command = [str(script), "generate", "--num", str(num), "--out", out, "--nfe", str(NFE), "--devices", str(cores)]
    command += ["--engine", engine]
    command += ["--address", "local"] if engine == "ray" else []
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    return float(report["ready_seconds"] + report["sampling_seconds"])


TRAILING = {"kind": "DPMSolverMultistepScheduler", "options": {"timestep_spacing": "trailing"}, "steps": 20}
DDPM = {"kind": "DDPMScheduler", "options": {"timestep_spacing": "trailing"}, "steps": 250}
PEERS: dict[str, tuple[Callable[..., float], tuple[Any, ...], float, tuple[Any, ...]]] = {
    # Function, its arguments, the part of the images it makes, and the code that a user writes.
    "mlem-dist on Ray": (ours, ("ray",), 1, ()),
    "mlem-dist in process": (ours, ("inline",), 1, ()),
    "Ray Data, ML-EM sampler": (ray_data, (Sampler, {}), 1, (Sampler, as_png, ray_data)),
    "Ray Data, DPM-Solver++ 20 steps": (ray_data, (Diffusers, TRAILING), 0.25, (Diffusers, as_png, ray_data)),
    "Ray Data, DDPM 250 steps": (ray_data, (Diffusers, DDPM), 0.05, (Diffusers, as_png, ray_data)),
}


def digest(out: Path) -> str:
    """Of all images in the order of their ids."""
    table = pq.read_table(out / "data" if (out / "data").exists() else out)
    ids, images = (table["sample_id" if "sample_id" in table.column_names else "id"], table["image"].to_pylist())
    files = [image["bytes"] if isinstance(image, dict) else image for image in images]
    return hashlib.sha256(b"".join(files[i] for i in np.argsort(ids.to_numpy()))).hexdigest()


def run(name: str, num: int, cores: int) -> dict[str, Any]:
    """One way, timed, in this process."""
    function, arguments, _, code = PEERS[name]
    with tempfile.TemporaryDirectory() as folder:
        if function is ray_data:
            import ray

            ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
        seconds = function(num, f"{folder}/out", cores, *arguments)
        images = digest(Path(folder) / "out")
    lines = sum(len([line for line in inspect.getsource(one).splitlines() if line.strip()]) for one in code) or 1
    row = {"way": name, "num": num, "seconds": seconds, "images_per_second": num / seconds, "lines": lines}
    return row | {"images": images}


@click.command()
@click.option("--num", default=3000)
@click.option("--cores", default=2)
@click.option("--only", type=click.Choice(list(PEERS)))
@click.option("--out", type=click.Path(path_type=Path))
def main(num: int, cores: int, only: str | None, out: Path | None) -> None:
    """Slower ways make a part of the images."""
    if only:
        print(json.dumps(run(only, num, cores)))
        return
    rows = []
    for name, (_, _, part, _) in PEERS.items():
        images = max(BLOCK * cores, round(num * part / BLOCK) * BLOCK)
        command = [sys.executable, __file__, "--num", str(images), "--cores", str(cores), "--only", name]
        output, used, memory = watched(command, os.environ | {"OMP_NUM_THREADS": "1"})
        row = json.loads(output.splitlines()[-1])
        rows.append(row | {"cpu_seconds_per_image": used / row["num"], "memory_mib": memory})
        print(rows[-1], flush=True)
    if len({row["images"] for row in rows if row["num"] == num}) != 1:
        sys.exit("the same sampler made different images")
    assert out, "--out is missing"
    out.write_text(json.dumps({"machine": f"{platform.machine()}, {cores} cores", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
