"""Images as a ladder's samples: pixels, or latents of its decoder."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import OWN
from mlem_dist.machine import available_cores
from mlem_dist.models.devices import default_device, one_thread
from mlem_dist.models.pixels import to_range

T = TypeVar("T")

BATCH = 8
"""Number of images or samples that a model takes at a time."""

ENCODED = 4096
"""Largest number of images that are encoded to latents."""


@torch.inference_mode()
def samples_of_images(
    ladder: Ladder, pixels: Tensor, label: Tensor, notify: Callable[[str], None] = lambda sentence: None
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Images as samples of a ladder, their labels, and the function that maps a part of the samples to the values.

    Without a decoder, samples are the images as they are, uint8 (n, C, H, W), because float32 may not fit into memory.
    With one, they are the latents of at most `ENCODED` of the images, float32.
    """
    device = default_device()
    decoder = ladder.load_decoder(device, OWN)
    if decoder is None:
        return pixels, label, partial(to_range, value_range=ladder.value_range)
    index = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:ENCODED]
    notify(f"Encoding {len(index):,} images.")
    parts = in_batches(index, lambda part: decoder.latents(to_range(pixels[part].to(device))).cpu())
    return torch.cat(parts), label[index], Tensor.float


def in_batches(index: Tensor, run: Callable[[Tensor], T]) -> list[T]:
    """The results of `run` for parts of `BATCH` numbers, side by side on a CPU, each on one thread."""
    workers = available_cores() if default_device() == "cpu" else 1
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(torch.inference_mode()(run), index.split(BATCH)))
