"""What is measured of levels: seconds per sample, and the error of the noise that they predict."""

import json
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.files import read_object, replace_file
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import LADDER
from mlem_dist.models.graphs import as_run
from mlem_dist.models.memory import keep_memory
from mlem_dist.models.pixels import to_range
from mlem_dist.solver.schedule import add_noise

WARM, REPEATS = 2, 7
"""Evaluations before those that are timed, and those."""

BATCH = {"cpu": 64, "cuda": 512}
"""Samples by which a level's cost is measured, by device type: about a block."""


@torch.inference_mode()
def seconds_per_sample(
    level: Callable[[Tensor, Tensor, Tensor], Tensor],
    shape: tuple[int, int, int],
    classes: int,
    device: str,
    batch: int,
    warm: int = WARM,
    repeats: int = REPEATS,
) -> float:
    """Median time of `repeats` evaluations of a batch after `warm` others, per sample, on one CPU thread or one GPU.

    On a CPU it is the thread's own time, in which other programs that share the cores do not count.
    """
    keep_memory()
    clock = time.perf_counter if device == "cuda" else time.thread_time
    x = torch.randn(batch, *shape, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    label = torch.arange(batch, device=device) % max(1, classes)
    times = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(warm + repeats):
            start = clock()
            level(x, t, label)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return median(times[warm:]) / batch


def measure_costs(ladder: Ladder) -> Ladder:
    """The ladder with its levels' costs on this machine's devices in `ladder.json`, whose other entries stay."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    raw = read_object(ladder.folder / LADDER, "ladder")
    for number, entry in enumerate(raw["levels"], 1):
        seconds = {
            device: seconds_per_sample(
                as_run(ladder.load_level(number, device), device),
                ladder.sample_shape,
                len(ladder.labels),
                device,
                BATCH[device],
            )
            for device in devices
        }
        entry["seconds"] = entry.get("seconds", {}) | seconds
    replace_file(ladder.folder / LADDER, json.dumps(raw, indent=2) + "\n")
    return Ladder.load(ladder.folder)


@torch.inference_mode()
def denoising_errors(
    module: nn.Module,
    images: Tensor,
    label: Tensor,
    a: np.ndarray,
    bands: int,
    per_band: int,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> np.ndarray:
    """Squared error of the predicted noise, mean over the values of a sample, float64 (bands, per_band).

    Band j holds the timesteps j T / bands ... (j + 1) T / bands of the schedule a (T,). Images (n, C, H, W) uint8 with
    classes label (n,) int64 lie on the module's device. Which images, timesteps and noises are drawn from them depends
    on nothing but the numbers, so the errors of several levels are pairs.
    """
    device = images.device
    schedule = torch.tensor(a, dtype=torch.float32, device=device)
    errors = np.empty((bands, per_band))
    for band in range(bands):
        rng = torch.Generator().manual_seed(band)
        index = torch.randint(len(images), (per_band,), generator=rng)
        times = torch.randint(band * len(a) // bands, (band + 1) * len(a) // bands, (per_band,), generator=rng)
        for rows in torch.arange(per_band).split(100):
            x0 = to_range(images[index[rows]], value_range)
            noise = torch.randn(x0.shape, generator=rng).to(device)
            t = times[rows].to(device)
            predicted = module(add_noise(x0, noise, t, schedule), t, label[index[rows]])
            errors[band, rows.numpy()] = (predicted - noise).square().mean(dim=(1, 2, 3)).cpu().numpy()
    return errors
