"""Train the levels of a ladder, each on its own; training resumes after a kill at any time."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlem_dist.files import replace_file
from mlem_dist.ladder.gaussian_fit import embedded
from mlem_dist.ladder.images import Images
from mlem_dist.ladder.measure import denoising_errors
from mlem_dist.models.families import FAMILIES
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.level import ModelLevel, new_unet_level
from mlem_dist.models.weights import load_model, save_tensors
from mlem_dist.solver.condition import Condition, move
from mlem_dist.solver.process import FlowProcess, Process
from mlem_dist.solver.schedulers import BANDS
from mlem_dist.training.config import LevelConfig, TrainConfig
from mlem_dist.training.data import Conditions, conditions_of

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 45.0
LOG = "log.jsonl"
MOMENTS = ("exp_avg", "exp_avg_sq")

FITTED = 20_000
"""Largest number of images with captions to which a Gaussian level is fitted."""

HELD_OUT = 1_000
"""Largest number of images with captions on which errors are measured."""


def fast_attention(device: str) -> AbstractContextManager[None]:
    """Context in which the backward pass of attention is fast: on a CPU, that of the fused kernel is not."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


class DivergedError(RuntimeError):
    """The loss or the held-out error is not finite; the last checkpoint is kept."""


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def training_times(process: Process, level: LevelConfig, rng: torch.Generator) -> Tensor:
    """Times of the samples of a batch, (batch size,); those of a flow follow the scheduler's shift, as its steps do."""
    if not isinstance(process, FlowProcess):
        return process.times(0, 1, level.batch_size, rng)
    if level.noise_levels == "logit-normal":
        sigma = torch.randn(level.batch_size, generator=rng).sigmoid()
    else:
        sigma = torch.rand(level.batch_size, generator=rng)
    return process.shifted(sigma) * process.length


def _batch(
    images: Images, seed: int, level: LevelConfig, process: Process, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples, labels, noise and times of step `step`: a function of the seed and the batch size on any device."""
    n = len(images.train)
    position = np.arange(step * level.batch_size, (step + 1) * level.batch_size)
    index = np.empty(level.batch_size, dtype=np.int64)
    for epoch in np.unique(position // n):
        selected = position // n == epoch
        index[selected] = _permutation(seed, int(epoch), n)[position[selected] % n]
    rng = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1)
    x0 = images.samples(images.train[index])
    noise = torch.randn(x0.shape, generator=rng)
    t = training_times(process, level, rng)
    label = images.train_label[index]
    if level.condition_dropout:
        dropped = torch.rand(level.batch_size, generator=rng) < level.condition_dropout
        label = label.where(~dropped, len(images.captions or images.labels))
    return x0, label, noise, t


def learning_rate(highest: float, steps: int, step: int) -> float:
    """Learning rate of a step: linear warm-up over the first 2 % of the steps, then cosine decay to zero."""
    warm = max(1, steps // 50)
    return highest * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _check_finite(name: str, value: float, level: LevelConfig, step: int, folder: Path) -> None:
    if not math.isfinite(value):
        kept = (
            f"the last good checkpoint is kept in {folder}" if (folder / CHECKPOINT).exists() else "nothing was saved"
        )
        raise DivergedError(
            f"level {level.name!r}: the {name} is {value} at step {step}; {kept}; lower its learning_rate and run the "
            "same command again"
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a loss log, without a line that a kill has cut off; empty if there is no log."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


class TrainingState:
    """Contents of a checkpoint: the model's weights, their moving average and Adam's moments."""

    def __init__(self, model: nn.Module, average: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self.weights, self.averaged = model.state_dict(), average.state_dict()
        self.parameters, self.optimizer = dict(model.named_parameters()), optimizer

    def load(self, path: Path) -> int:
        """Load the state from a checkpoint, and return its number of steps."""
        with safe_open(path, "pt") as file:
            for name, value in self.weights.items():
                value.copy_(file.get_tensor(f"model/{name}"))
                self.averaged[name].copy_(file.get_tensor(f"average/{name}"))
            step = int(file.metadata()["step"])
            for name, parameter in self.parameters.items():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{
                        moment: torch.empty_like(parameter).copy_(file.get_tensor(f"{moment}/{name}"))
                        for moment in MOMENTS
                    },
                }
        return step

    def save(self, path: Path, step: int) -> None:
        """Write a checkpoint as one flat dictionary, without pickle and independent of device and memory layout."""
        tensors = {f"model/{name}": value for name, value in self.weights.items()}
        tensors |= {f"average/{name}": value for name, value in self.averaged.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{moment}/{name}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_tensors(path, tensors, {"step": str(step)})

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Update the moving average of the weights."""
        for name, value in self.weights.items():
            self.averaged[name].lerp_(value, 1 - decay)


def new_level(config: TrainConfig, level: LevelConfig, classes: int, gaussian: GaussianLevel | None) -> ModelLevel:
    """An untrained network for so many classes, 0 for none; a "residual" corrects `gaussian`."""
    if level.kind == "unet":
        # The class after the last stands for none.
        classes += level.condition_dropout > 0
        process, shape = config.process, config.sample_shape
        return new_unet_level(shape, classes, level.patch, level.prediction, process, level.model, gaussian)
    family = FAMILIES[level.kind]
    model = family.model_class()(**level.model)
    return ModelLevel(model, 1, level.prediction, config.process, None, family=family)


def train_network(
    config: TrainConfig,
    level: LevelConfig,
    images: Images,
    folder: Path,
    gaussian: GaussianLevel | None,
    teacher: nn.Module | None,
    device: str = "cpu",
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> ModelLevel:
    """Train one network on `device`, and return its exponential moving average.

    The level learns the drift of the process or, with a `teacher`, the teacher's prediction; a "residual" corrects
    `gaussian`. In bfloat16, the network computes with float32 weights. On a GPU, UNets are laid out channels last.

    `folder` keeps `checkpoint.safetensors` and `log.jsonl`. The checkpoint is written every 45 seconds; a later call
    continues from it with the same batches, on any device. The log has a line every 100 steps, with step, loss (mean
    squared error per value of the model's output) and seconds. At every twentieth of the steps, the line also has the
    held-out `denoising_error` of the average. `progress` is called after each step with the number of steps done and
    the loss.

    Raises:
        DivergedError: if the loss or the held-out error is NaN or infinite; the last checkpoint, from before, is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log_file = folder / CHECKPOINT, folder / LOG
    process, conditions = config.process, conditions_of(config, images, device)
    torch.manual_seed(config.seed)
    model = new_level(config, level, len(images.labels), gaussian).to(device)
    network: Any = model.model
    if teacher is not None:
        teacher.to(device)
    if device == "cuda" and level.kind == "unet":
        # On a CPU, this layout gains nothing.
        network.to(memory_format=torch.channels_last)
    if level.start and not checkpoint.exists():
        network.load_state_dict(load_model(type(network), Path(level.start), "float32").state_dict())
    average = deepcopy(model).eval()
    if level.precision == "bfloat16" or (level.precision == "auto" and device == "cuda"):
        # The network alone: the code around it divides by sqrt(alpha_bar), which would magnify rounding errors.
        network.forward = torch.autocast(device, torch.bfloat16)(network.forward)
    if level.compile:
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=level.learning_rate, weight_decay=1e-4)
    state = TrainingState(network, average.model, optimizer)
    start = state.load(checkpoint) if checkpoint.exists() else 0
    kept_lines = "".join(json.dumps(line) + "\n" for line in read_log(log_file) if line["step"] <= start)
    replace_file(log_file, kept_lines)
    if lines := read_log(log_file):
        progress(start, lines[-1]["loss"])

    model.train()
    began_at = saved_at = time.monotonic()
    losses: list[float] = []

    def batch(step: int) -> tuple[Tensor, Condition, Tensor, Tensor]:
        x0, label, noise, t = _batch(images, config.seed, level, process, step)
        return x0.to(device), move(conditions(label.to(device)), device), noise.to(device), t.to(device)

    # The next batch is prepared while the model trains on the current one.
    with log_file.open("a", encoding="utf-8") as log, ThreadPoolExecutor(1) as batch_executor, fast_attention(device):
        next_batch = batch_executor.submit(batch, start)
        for step in range(start, level.steps):
            x0, condition, noise, t = next_batch.result()
            next_batch = batch_executor.submit(batch, step + 1)
            x = process.mixed(x0, noise, t)
            with torch.no_grad():
                target = process.target(x0, noise, t) if teacher is None else teacher(x, t, condition)
            loss = (model.loss_weight(t) * (model(x, t, condition) - target).square()).mean()
            losses.append(loss.item())
            _check_finite("loss", losses[-1], level, step, folder)
            # Save before the update, because only the next loss shows whether the update diverges.
            if step > start and time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                state.save(checkpoint, step)
                saved_at = time.monotonic()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(level.learning_rate, level.steps, step)
            optimizer.step()
            state.follow(min(level.ema, (1 + step) / (10 + step)))
            done = step + 1
            progress(done, losses[-1])
            if done % 100 == 0 or done == level.steps:
                line: dict[str, Any] = {
                    "step": done,
                    "loss": sum(losses) / len(losses),
                    "seconds": time.monotonic() - began_at,
                }
                if done % max(100, level.steps // 2000 * 100) == 0 or done == level.steps:
                    line["denoising_error"] = denoising_error(
                        average, images, process, conditions, device, per_band=100
                    )
                    _check_finite("held-out denoising error", sum(line["denoising_error"]), level, done, folder)
                log.write(json.dumps(line) + "\n")
                log.flush()
                losses = []
    if start < level.steps:
        state.save(checkpoint, level.steps)
    return average


def fit_gaussian(config: TrainConfig, level: LevelConfig, images: Images) -> GaussianLevel:
    """Gaussian level fitted to the training images, or to `FITTED` of them if they have captions."""
    classes, d = max(1, len(images.labels)), math.prod(config.sample_shape)
    gaussian = GaussianLevel(classes, d, level.rank, config.process)
    train, label = images.train, images.train_label
    if images.captions:
        train, label = train[:FITTED], label[:FITTED]
        condition = embedded(conditions_of(config, images, "cpu"), label)
    else:
        condition = images.condition(label)
    gaussian.fit(train, condition, images.samples)
    gaussian.eval()
    return gaussian


def denoising_error(
    model: nn.Module,
    images: Images,
    process: Process,
    conditions: Conditions,
    device: str = "cpu",
    per_band: int = 1000,
) -> list[float]:
    """Mean squared error per value of the drift on held-out images, by equal bands of noise.

    The images, times and noises are the same for every level. `device` is the device of the model.
    """
    held_out = slice(HELD_OUT if images.captions else None)
    test, label = images.test[held_out].to(device), images.test_label[held_out].to(device)
    condition = move(conditions(label), device)
    return denoising_errors(model, test, condition, process, BANDS, per_band, images.samples).mean(1).tolist()
