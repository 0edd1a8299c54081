"""Whether a small level that learns what the best one predicts, not the noise, leaves a smaller increment to it.

python benchmarks/distillation/distillation.py --data /usr/share/datasets/fashion-mnist --steps 1500 \
    --out benchmarks/results/distillation.json

Trains a small UNet twice from the same start, on the same images and noises: without a teacher, and with the best level
of the ladder as one. Increments are measured at the states of the teacher's trajectories.
"""

import json
import platform
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch

from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import denoising_errors
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.steps import solver_table
from mlem_dist.training.config import LevelConfig, TrainConfig
from mlem_dist.training.train import train_network
from mlem_dist.tuning.calibrate import best_trajectory

CHANNELS = [16, 24, 32]
SAMPLES, STEPS = 64, 50


def small(name: str, steps: int, teacher: str) -> LevelConfig:
    blocks = len(CHANNELS)
    model = {
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * blocks,
        "up_block_types": ["UpBlock2D"] * blocks,
        "norm_num_groups": 8,
    }
    return LevelConfig(name, "unet", 0, 2, "residual", teacher, model, steps, 64, 2e-3)


@click.command()
@click.option("--ladder", "name", default="fashion")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=1500)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(name: str, data: Path, steps: int, out: Path) -> None:
    torch.set_num_threads(1)
    ladder = Ladder.load(name)
    images = load_images(data, ladder.sample_shape, ladder.labels)
    gaussian, best = ladder.load_level(1, "cpu"), ladder.load_level(len(ladder.levels), "cpu")
    assert isinstance(gaussian, GaussianLevel)
    table = solver_table(ladder.process, STEPS, "sde")
    condition = ladder.condition(torch.arange(SAMPLES))
    noise = image_noise(range(SAMPLES), ladder.sample_shape, "cpu")
    states = best_trajectory({1: best}, table, noise, condition, lambda *_: None)
    rows = []
    for kind, teacher in (("plain", None), ("distilled", best)):
        level = small(kind, steps, "best" if teacher else "")
        config = TrainConfig(ladder.name, ladder.sample_shape, ladder.scheduler, (level,), ladder.labels)
        began = time.thread_time()
        with tempfile.TemporaryDirectory() as folder:
            module = train_network(
                config, level, images, Path(folder), gaussian, teacher, "cpu", lambda *_: None
            ).eval()
        seconds = time.thread_time() - began
        errors = denoising_errors(module, images.test, images.condition(images.test_label), ladder.process, 10, 500)
        with torch.inference_mode():
            increments = [
                float((best(x, t, condition) - module(x, t, condition)).square().mean())
                for x, t in ((x, torch.full((SAMPLES,), float(t))) for x, t in zip(states, table.t, strict=False))
            ]
        row = {"kind": kind, "training_seconds": seconds, "denoising_error": float(errors.mean())}
        rows.append(row | {"increment_to_best": float(np.mean(increments)), "by_step": increments})
        print(row | {"increment_to_best": rows[-1]["increment_to_best"]}, flush=True)
    about = {
        "machine": f"{platform.machine()}, one thread",
        "ladder": ladder.digest,
        "teacher": ladder.levels[-1].name,
        "steps": steps,
        "block_out_channels": CHANNELS,
        "samples": SAMPLES,
        "ratio": rows[1]["increment_to_best"] / rows[0]["increment_to_best"],
    }
    out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
