"""Measurements of levels: seconds per sample, and the error of the drift."""

import json
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.files import read_object, replace_file
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import LADDER, OWN
from mlem_dist.models.devices import one_thread
from mlem_dist.models.graphs import as_run
from mlem_dist.models.memory import keep_memory
from mlem_dist.models.pixels import to_range
from mlem_dist.solver.condition import Condition, take
from mlem_dist.solver.integrate import Drift
from mlem_dist.solver.process import Process

WARM, REPEATS = 2, 7
"""Numbers of untimed evaluations for warm-up and of timed evaluations."""

BATCH = {"cpu": 64, "cuda": 512}
"""Largest batch size, in samples, of cost measurements by device type: about one block."""

CALL_SECONDS = 1.0
"""Longest evaluation of a batch in cost measurements, in seconds, unless one sample takes longer."""

STAGE_SAMPLES = 4
"""Number of samples for which stages are timed."""


@torch.inference_mode()
def seconds_per_sample(
    level: Drift,
    ladder: Ladder,
    device: str,
    batch: int,
    warm: int = WARM,
    repeats: int = REPEATS,
) -> float:
    """Median seconds per sample of `repeats` evaluations of a batch after `warm` others, on one CPU thread or one GPU.

    The level is one of the ladder, whose classes the batch takes in turn. On a CPU this is the CPU time of the thread,
    which excludes other programs that share the cores.
    """
    keep_memory()
    clock = time.perf_counter if device == "cuda" else time.thread_time
    x = torch.randn(batch, *ladder.sample_shape, device=device)
    t = torch.ones(batch, device=device)
    condition = ladder.condition(torch.arange(batch, device=device))
    times = []
    with one_thread():
        for _ in range(warm + repeats):
            start = clock()
            level(x, t, condition, {})
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - start)
    return median(times[warm:]) / batch


def measure_costs(ladder: Ladder) -> Ladder:
    """Measure the costs of levels and stages on this machine's devices, and store them in `ladder.json`.

    The bytes of the levels' activations, which do not depend on a machine, are stored with them.

    Returns:
        The ladder with the new costs.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    raw = read_object(ladder.folder / LADDER, "ladder")
    for number, entry in enumerate(raw["levels"], 1):
        seconds = {
            device: _level_seconds(as_run(ladder.load_level(number, device, OWN), device), ladder, device)
            for device in devices
        }
        entry["seconds"] = entry.get("seconds", {}) | seconds
        if size := ladder.activation_bytes[number - 1]:
            entry["activation_bytes"] = size
    for part, measure in (("encoder", _encoder_seconds), ("decoder", _decoder_seconds)):
        if entry := raw.get(part):
            entry["seconds"] = entry.get("seconds", {}) | {device: measure(ladder, device) for device in devices}
    replace_file(ladder.folder / LADDER, json.dumps(raw, indent=2) + "\n")
    return Ladder.load(ladder.folder)


def _level_seconds(level: Drift, ladder: Ladder, device: str) -> float:
    """Seconds per sample of a level, in a batch that takes about `CALL_SECONDS`."""
    single = seconds_per_sample(level, ladder, device, 1, 1, 1)
    if single > CALL_SECONDS:
        return single
    return seconds_per_sample(level, ladder, device, min(BATCH[device], int(CALL_SECONDS / single)))


def _encoder_seconds(ladder: Ladder, device: str) -> float:
    """Seconds per sample of the encoder, for samples whose prompts all differ and have no negative prompts."""
    encoder = ladder.load_encoder(device, OWN)
    assert encoder
    prompts = [f"a photograph of {number} red apples on a table" for number in range(STAGE_SAMPLES)]
    return _stage_seconds(lambda: encoder(prompts, [None] * len(prompts)), device)


def _decoder_seconds(ladder: Ladder, device: str) -> float:
    """Seconds per sample of the decoder."""
    decoder = ladder.load_decoder(device, OWN)
    assert decoder
    latents = torch.randn(STAGE_SAMPLES, *ladder.sample_shape, device=device)
    return _stage_seconds(lambda: decoder(latents), device)


@torch.inference_mode()
def _stage_seconds(run: Callable[[], object], device: str) -> float:
    """Seconds per sample of a stage's second run of `STAGE_SAMPLES` samples, on one CPU thread or one GPU."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    with one_thread():
        for _ in range(2):
            start = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = clock() - start
    return seconds / STAGE_SAMPLES


@torch.inference_mode()
def denoising_errors(
    module: nn.Module,
    images: Tensor,
    condition: Condition,
    process: Process,
    bands: int,
    per_band: int,
    in_range: Callable[[Tensor], Tensor] = to_range,
) -> np.ndarray:
    """Squared errors of a level's drift, each the mean over the values of a sample, float64 (bands, per_band).

    Args:
        module: the level.
        images: images, uint8 or as latents (n, C, H, W), on the module's device.
        condition: the condition of the images, on the same device.
        process: the ladder's process.
        bands: number of equal bands of noise; the first band has the least noise.
        per_band: number of samples in a band. Images, times and noises are the same for every level.
        in_range: map from a part of the images to a finished sample's values.
    """
    device = images.device
    errors = np.empty((bands, per_band))
    for band in range(bands):
        rng = torch.Generator().manual_seed(band)
        index = torch.randint(len(images), (per_band,), generator=rng)
        times = process.times(band, bands, per_band, rng)
        for rows in torch.arange(per_band).split(100):
            x0 = in_range(images[index[rows]])
            noise = torch.randn(x0.shape, generator=rng).to(device)
            t = times[rows].to(device)
            value = module(process.mixed(x0, noise, t), t, take(condition, index[rows]))
            error = value - process.target(x0, noise, t)
            errors[band, rows.numpy()] = error.square().mean(dim=(1, 2, 3)).cpu().numpy()
    return errors
