"""The share of noise in the time of blocks, from seeds to images.

python benchmarks/runtime/noise.py --out benchmarks/results/noise.json
"""

import json
import platform
import time
from pathlib import Path

import click
import torch
from torch import Tensor

from mlem_dist.api.arguments import find_plan
from mlem_dist.engine import blocks as engine_blocks
from mlem_dist.engine.inline import block_maker
from mlem_dist.engine.job import Job
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.sizes import BLOCK_SIZE
from mlem_dist.solver.noise import Noise, image_noise

STEPS, BLOCKS = 250, 3
CASES = [("ode", 2), ("ode", 10), ("sde", 2), ("sde", 10), ("sde", 40)]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """CPU seconds of blocks and of their noise, on one thread, by solver and budget."""
    ladder, size, rows = Ladder.load("fashion"), BLOCK_SIZE["cpu"], []
    spent = 0.0

    def timed(noise: Noise) -> Noise:
        def draw(step: int) -> Tensor:
            nonlocal spent
            start = time.thread_time()
            value = noise(step)
            spent += time.thread_time() - start
            return value

        return draw

    engine_blocks.image_noise = lambda *arguments: timed(image_noise(*arguments))
    for solver, nfe in CASES:
        plan, _ = find_plan(ladder, ladder.cost("cpu"), solver=solver, steps=STEPS, nfe=nfe)
        labels = tuple(range(len(ladder.labels)))
        num = BLOCKS * size
        job = Job("fashion", ladder.digest, num, labels, solver, STEPS, plan, 0, size, num, "cpu")
        make = block_maker(job, ladder)
        make(0)
        spent, start = 0.0, time.thread_time()
        for block in range(BLOCKS):
            make(block)
        seconds = time.thread_time() - start
        row = {"solver": solver, "nfe": nfe, "seconds_per_image": seconds / num, "noise_share": spent / seconds}
        rows.append(row)
        print(row, flush=True)
    result = {"machine": platform.machine(), "torch": torch.__version__, "block_size": size, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
