"""Train the levels of a ladder, each on its own, resumable at any kill."""

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mlem_dist.ladder.levels import GaussianLevel, UNetLevel, new_unet_level
from mlem_dist.ladder.measure import add_noise, denoising_errors, to_range
from mlem_dist.ladder.schedule import alpha_bar
from mlem_dist.training.config import LevelConfig, TrainConfig
from mlem_dist.training.data import Images

CHECKPOINT_SECONDS = 45.0


class DivergedError(RuntimeError):
    """The training loss became non-finite; the last checkpoint is kept."""


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _batch(images: Images, config: TrainConfig, level: LevelConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step `step`'s images, labels, noise and timesteps: a function of the seed, the same stream for every level."""
    n = len(images.train)
    position = np.arange(step * level.batch_size, (step + 1) * level.batch_size)
    index = np.empty(level.batch_size, dtype=np.int64)
    for epoch in np.unique(position // n):
        here = position // n == epoch
        index[here] = _permutation(config.seed, int(epoch), n)[position[here] % n]
    rng = torch.Generator().manual_seed(
        int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0] >> 1)
    )
    x0 = to_range(images.train[index])
    noise = torch.randn(x0.shape, generator=rng)
    t = torch.randint(config.scheduler["num_train_timesteps"], (level.batch_size,), generator=rng)
    return x0, images.train_label[index], noise, t


def _learning_rate(level: LevelConfig, step: int) -> float:
    """Cosine decay to zero after a linear warm-up over the first 2 % of the steps."""
    warm = max(1, level.steps // 50)
    return level.learning_rate * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / level.steps)))


def _save(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary, {"step": str(step)})
    temporary.replace(path)


def train_unet(
    config: TrainConfig,
    level: LevelConfig,
    images: Images,
    folder: Path,
    gaussian: GaussianLevel | None,
    teacher: nn.Module | None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> UNetLevel:
    """Train one UNet level, and return its exponential moving average.

    It learns to predict the noise or, with a `teacher`, what that level predicts; a "residual" corrects `gaussian`.

    `folder` keeps `checkpoint.safetensors`, written every 45 seconds and from which a later call continues with the
    same batches, and `log.jsonl`: every 100 steps a line with step, loss (mean squared error per value of the model's
    output) and seconds; at every twentieth of the steps the held-out `denoising_error` of the average as well.
    `progress` is called after each step with the number of steps done and the loss.

    Raises:
        DivergedError: the loss is NaN or infinite; the last checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    schedule = alpha_bar(config.scheduler)
    a = torch.tensor(schedule, dtype=torch.float32)
    torch.manual_seed(config.seed)
    model = new_unet_level(
        config.sample_shape, len(config.labels), level.patch, level.prediction, schedule, level.model, gaussian
    )
    average = deepcopy(model).eval()
    weights, averaged = model.model.state_dict(), average.model.state_dict()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=level.learning_rate, weight_decay=1e-4)
    names = [name for name, _ in model.model.named_parameters()]
    start = 0
    if checkpoint.exists():
        with safe_open(checkpoint, "pt") as file:
            start = int(file.metadata()["step"])
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        for name, value in weights.items():
            value.copy_(saved[f"model/{name}"])
            averaged[name].copy_(saved[f"average/{name}"])
        for name, parameter in model.model.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(start)),
                "exp_avg": saved[f"exp_avg/{name}"],
                "exp_avg_sq": saved[f"exp_avg_sq/{name}"],
            }

    def save(step: int) -> None:
        # One flat dictionary with Adam's moments and the average, so that a checkpoint needs no pickle.
        state = {f"model/{name}": value for name, value in weights.items()}
        state |= {f"average/{name}": value for name, value in averaged.items()}
        for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}/{name}"] = optimizer.state[parameter][moment]
        _save(checkpoint, state, step)

    model.train()
    began = saved_at = time.monotonic()
    losses: list[float] = []
    with (folder / "log.jsonl").open("a") as log:
        for step in range(start, level.steps):
            x0, label, noise, t = _batch(images, config, level, step)
            x = add_noise(x0, noise, t, a)
            with torch.no_grad():
                target = noise if teacher is None else teacher(x, t, label)
            loss = (model.loss_weight(t) * (model(x, t, label) - target).square()).mean()
            if not math.isfinite(loss.item()):
                raise DivergedError(
                    f"level {level.name!r}: the loss is {loss.item()} at step {step}; the last good checkpoint is "
                    f"in {folder}; lower the learning rate"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = _learning_rate(level, step)
            optimizer.step()
            decay = min(level.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in weights.items():
                    averaged[name].lerp_(value, 1 - decay)
            losses.append(loss.item())
            done, now = step + 1, time.monotonic()
            progress(done, losses[-1])
            if done % 100 == 0 or done == level.steps:
                line: dict[str, Any] = {"step": done, "loss": sum(losses) / len(losses), "seconds": now - began}
                if done % max(100, level.steps // 2000 * 100) == 0 or done == level.steps:
                    line["denoising_error"] = denoising_error(average, images, schedule, per_band=100)
                log.write(json.dumps(line) + "\n")
                log.flush()
                losses = []
            if now - saved_at > CHECKPOINT_SECONDS or done == level.steps:
                save(done)
                saved_at = now
    return average


def fit_gaussian(config: TrainConfig, level: LevelConfig, images: Images) -> GaussianLevel:
    """The Gaussian level of the training images."""
    classes, d = max(1, len(config.labels)), math.prod(config.sample_shape)
    gaussian = GaussianLevel(classes, d, level.rank, alpha_bar(config.scheduler))
    gaussian.fit(to_range(images.train), images.train_label)
    gaussian.eval()
    return gaussian


def denoising_error(
    model: nn.Module, images: Images, a: np.ndarray, bands: int = 10, per_band: int = 1000
) -> list[float]:
    """Mean squared error per value of the predicted noise on held-out images, in equal bands of timesteps.

    The images, timesteps and noises are the same for every level.
    """
    return denoising_errors(model, images.test, images.test_label, a, bands, per_band).mean(1).tolist()
