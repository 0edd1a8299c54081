"""A Gaussian level for a new ladder, fitted to images or to samples of its best level."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.ladder.images import CAPTIONS, has_captions, load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.latents import in_batches, samples_of_images
from mlem_dist.ladder.schema import OWN
from mlem_dist.models.devices import default_device
from mlem_dist.models.gaussian import GaussianLevel, embedding
from mlem_dist.models.graphs import as_run
from mlem_dist.solver.condition import LABEL, TEXT, Condition, join
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import single_level
from mlem_dist.solver.steps import solver_table

STEPS = 20
"""Number of steps of samples of the best level. Means and covariances do not need the last digit of a sample."""

FEWEST = 16
"""Smallest number of samples of a fit."""

RANK = 256
"""Largest rank of a covariance, beside its isotropic part."""

CLASS_SAMPLES = 500
"""Smallest number of samples of a class with which each class gets a covariance of its own."""

TEXTS = 64
"""Number of captions that are encoded together."""

BASES_BYTES = 2**28
"""Memory limit, in bytes, for the covariances of all classes; above it, all classes share one."""


@torch.inference_mode()
def gaussian_of_images(ladder: Ladder, folder: Path, notify: Callable[[str], None]) -> GaussianLevel:
    """A Gaussian level fitted to the images in a folder, through the ladder's decoder if samples are latents.

    For a ladder with prompts, its mean depends on the images' captions, if they have any.

    Raises:
        UsageError: if the folder has no images, or their classes are not the ladder's.
    """
    captions = CAPTIONS if ladder.encoder and has_captions(folder, CAPTIONS) else ""
    images = load_images(folder, ladder.image_shape, ladder.labels, captions)
    for sentence in images.notes():
        notify(sentence)
    x0, label, in_range = samples_of_images(ladder, images.train, images.train_label, notify)
    condition = images.condition(label)
    if images.captions:
        encoder = ladder.load_encoder(default_device(), OWN)
        assert encoder
        condition = embedded(
            lambda part: encoder([images.captions[number] for number in part.tolist()], [None] * len(part)), label
        )
    return _fit(ladder, x0, condition, in_range)


def embedded(conditions: Callable[[Tensor], Condition], label: Tensor) -> Condition:
    """The condition of captions by their numbers, int64 (n,), with their embeddings alone, on the CPU."""
    parts = [embedding(conditions(part)).cpu() for part in label.split(TEXTS)]
    return {TEXT: torch.cat(parts)[:, None]}


@torch.inference_mode()
def gaussian_of_samples(ladder: Ladder, number: int, notify: Callable[[str], None]) -> GaussianLevel:
    """A Gaussian level fitted to samples of the best level, which take the ladder's classes or prompts in turn.

    Raises:
        UsageError: if the samples are not finite.
    """
    device, best = default_device(), len(ladder.levels)
    notify(f"Making {number:,} samples of {ladder.levels[-1].name} in {STEPS} steps for the Gaussian level.")
    levels = {best: as_run(ladder.load_level(best, device), device)}
    table, plan = solver_table(ladder.process, STEPS, "dpm++"), single_level(best, best, STEPS)
    # Before several threads ask for conditions.
    ladder.condition(torch.arange(min(number, ladder.conditions), device=device))

    def sample(part: Tensor) -> tuple[Tensor, Condition]:
        condition = ladder.condition(part)
        noise = image_noise(part.tolist(), ladder.sample_shape, device)
        end = integrate(levels, table, plan, noise, condition).cpu()
        # Of a prompt, its embedding alone is needed.
        short = {LABEL: condition[LABEL]} if LABEL in condition else {}
        return end, {TEXT: embedding(condition)[:, None].cpu()} if ladder.encoder else short

    ends, conditions = zip(*in_batches(torch.arange(number, device=device), sample), strict=True)
    samples = torch.cat(ends)
    if not samples.isfinite().all():
        raise UsageError(f"`gaussian` {number}: samples of {ladder.levels[-1].name} are not finite; give images")
    return _fit(ladder, samples, {name: value.cpu() for name, value in join(conditions).items()}, Tensor.double)


def _fit(ladder: Ladder, x0: Tensor, condition: Condition, in_range: Callable[[Tensor], Tensor]) -> GaussianLevel:
    classes, d = max(1, len(ladder.labels)), math.prod(ladder.sample_shape)
    least = int(condition[LABEL].bincount(minlength=classes).min()) if LABEL in condition else len(x0)
    rank = max(1, min(RANK, d - 1, (least if least >= CLASS_SAMPLES else len(x0)) // 4))
    own = least >= CLASS_SAMPLES and 4 * classes * d * rank <= BASES_BYTES
    level = GaussianLevel(classes, d, rank, ladder.process, classes if own else 1)
    level.fit(x0, condition, in_range)
    return level.eval()
