"""From trained levels to a ladder folder."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mlem_dist.ladder.ladder import Ladder, Level, save_ladder, save_level
from mlem_dist.ladder.levels import GaussianLevel
from mlem_dist.ladder.measure import seconds_per_sample
from mlem_dist.ladder.schedule import alpha_bar
from mlem_dist.training.config import LevelConfig, TrainConfig
from mlem_dist.training.data import Images
from mlem_dist.training.train import denoising_error, fit_gaussian, train_unet

HALF_LOSS = 0.005
"""The relative loss in denoising error below which weights are stored in half precision."""


def measure(ladder: Ladder) -> Ladder:
    """The ladder with its levels' costs on this machine's devices in `ladder.json`."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    levels = []
    for number, level in enumerate(ladder.levels, 1):
        seconds = {
            device: seconds_per_sample(
                ladder.load_level(number, device), ladder.sample_shape, len(ladder.labels), device
            )
            for device in devices
        }
        levels.append(replace(level, seconds=level.seconds | seconds))
    return save_ladder(ladder.folder, ladder.name, ladder.sample_shape, ladder.labels, ladder.scheduler, levels)


def train_ladder(
    config: TrainConfig, images: Images, out: Path, progress: Callable[[str, int, int, float], None]
) -> Ladder:
    """Train what is not yet trained, level after level, and write the ladder to `out`.

    Training state stays in `out`/training, so that a call after a kill continues. `progress` is called with the
    level's name, the steps done, the steps in all and the loss.

    Raises:
        DivergedError: a loss became NaN or infinite.
    """
    a = alpha_bar(config.scheduler)
    trained: dict[str, nn.Module] = {}
    stored: dict[str, Level] = {}
    # Teachers before their pupils.
    for level in sorted(config.levels, key=lambda level: bool(level.teacher)):
        if level.kind == "gaussian":
            trained[level.name] = fit_gaussian(config, level, images)
        else:
            first = trained.get(config.levels[0].name)
            trained[level.name] = train_unet(
                config,
                level,
                images,
                out / "training" / level.name,
                first if isinstance(first, GaussianLevel) and level.prediction == "residual" else None,
                trained[level.teacher] if level.teacher else None,
                partial(_report, progress, level),
            )
        # From here on a level is what was stored of it.
        stored[level.name] = _store(out, level.name, trained[level.name], images, a)
    levels = [stored[level.name] for level in config.levels]
    ladder = save_ladder(out, config.name, config.sample_shape, config.labels, config.scheduler, levels)
    return measure(ladder)


def _report(progress: Callable[[str, int, int, float], None], level: LevelConfig, done: int, loss: float) -> None:
    progress(level.name, done, level.steps, loss)


def _store(out: Path, name: str, module: nn.Module, images: Images, a: np.ndarray) -> Level:
    """Save a level, in half precision where that costs no accuracy to speak of, with its denoising error."""
    out.mkdir(parents=True, exist_ok=True)
    full = denoising_error(module, images, a)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module.load_state_dict({key: value.half().float() for key, value in state.items()})
    half = denoising_error(module, images, a)
    if sum(half) <= (1 + HALF_LOSS) * sum(full):
        return replace(save_level(out, name, module, torch.float16), denoising_error=half)
    module.load_state_dict(state)
    return replace(save_level(out, name, module, torch.float32), denoising_error=full)
