"""Train the levels of a ladder in parallel, each as a Ray task."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from torch import nn

from mlem_dist.ladder.images import Images
from mlem_dist.ladder.schema import Level
from mlem_dist.training.assemble import finish_training, needs, train_level, training_order
from mlem_dist.training.config import LevelConfig, TrainConfig
from mlem_dist.training.resume import begin_training

POLL_SECONDS = 0.5
TENSORS = ("train", "train_label", "test", "test_label")

TrainingProgress = Mapping[str, tuple[int, float]]
"""Number of steps done and the loss, by the names of the levels that have begun."""


class Board:
    """Actor on which tasks post their progress."""

    def __init__(self) -> None:
        self.posted: dict[str, tuple[int, float]] = {}

    def post(self, name: str, done: int, loss: float) -> None:
        """Post the progress of a level."""
        self.posted[name] = (done, loss)

    def read(self) -> TrainingProgress:
        """Latest progress of each level."""
        return self.posted


def train_on_ray(config: TrainConfig, images: Images, out: Path, device: str) -> Iterator[TrainingProgress]:
    """Train the levels that are not yet trained, on the connected Ray, and write the ladder to `out`.

    Yields the progress twice a second. A level takes its share of the cores, and of the GPUs if it is trained there. It
    begins when the levels that it needs are trained. The result is that of `train_ladder` with as many threads. The
    caller must call `check_training` before.

    Raises:
        DivergedError: if the loss or the held-out error of a level is NaN or infinite.
        RuntimeError: if there is not enough memory, or the process of a level dies.
    """
    # Only the first error is raised. Ray would print the errors of results that are never fetched.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    begin_training(config, images, out)
    threads, gpus = level_share(config)
    kind: Any = ray.remote(Board)
    board = kind.options(num_cpus=0).remote()
    task: Any = ray.remote(_train)
    # Arrays and not tensors, so that the levels on a machine share one copy.
    arrays = [ray.put(getattr(images, name).numpy()) for name in TENSORS]
    captions = ray.put(images.captions)
    modules: dict[str, Any] = {}
    running: dict[Any, str] = {}
    for level in training_order(config):
        gaussian, teacher = (modules[name] if name else None for name in needs(config, level))
        modules[level.name], entry = task.options(
            name=f"train {level.name}",
            num_returns=2,
            num_cpus=threads,
            num_gpus=gpus if device == "cuda" else 0,
            # Ray would restart a level that is too large for the memory again and again.
            max_retries=0,
        ).remote(
            board, config, level, images.labels, captions, out.absolute(), gaussian, teacher, device, threads, *arrays
        )
        running[entry] = level.name
    stored: dict[str, Level] = {}
    try:
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for ref in ready:
                name = running.pop(ref)
                stored[name] = _result(ref, name)
            yield ray.get(board.read.remote())
    finally:
        # Cancel only tasks that have not ended: a race in Ray lets a cancel at the end of its task abort this process.
        for ref in running:
            ray.cancel(ref, force=True)
        ray.kill(board)
    finish_training(config, images, out, stored)


def level_share(config: TrainConfig) -> tuple[int, float]:
    """Number of threads and share of a GPU for each level, if the connected Ray trains as many in parallel as possible.

    Small networks leave most of a GPU idle, so several levels share a GPU if there are fewer GPUs than levels.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # A head node may have no cores, and then trains no level.
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    pupils = sum(bool(level.teacher) for level in config.levels)
    parallel_levels = max(pupils, sum(level.network for level in config.levels) - pupils, 1)
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    return max(1, min([sum(cores) // parallel_levels, *cores])), 1 / max(1, -(-parallel_levels // max(1, gpus)))


def _result(ref: Any, name: str) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause: Any = error
        # The error of a level whose teacher failed wraps the teacher's error.
        while isinstance(cause, RayTaskError) and cause.cause is not cause:
            cause = cause.cause
        raise cause from None
    except RayError as error:
        raise RuntimeError(
            f"level {name!r}: its process died ({str(error).splitlines()[0]}); if that was for lack of memory, lower "
            "its batch_size; the same command goes on from the last checkpoint"
        ) from None


def _train(
    board: Any,
    config: TrainConfig,
    level: LevelConfig,
    labels: tuple[str, ...],
    captions: tuple[str, ...],
    out: Path,
    gaussian: nn.Module | None,
    teacher: nn.Module | None,
    device: str,
    threads: int,
    *arrays: np.ndarray,
) -> tuple[nn.Module, Level]:
    torch.set_num_threads(threads)
    train, train_label, test, test_label = map(torch.from_numpy, arrays)
    images = Images(train, train_label, test, test_label, labels, captions)
    posted = 0.0
    last: Any = None

    def post(done: int, loss: float) -> None:
        nonlocal posted, last
        now = time.monotonic()
        if now - posted > POLL_SECONDS or done == level.steps:
            posted = now
            last = board.post.remote(level.name, done, loss)

    trained = train_level(config, level, images, out, gaussian, teacher, device, post)
    if last is not None:
        # Wait for the last post, so that the board has all steps when this task ends.
        ray.get(last)
    return trained
