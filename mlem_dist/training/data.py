"""What networks train on: images or latents of a pipeline's autoencoder, and the conditions of classes or captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlem_dist.ladder.create import Surroundings
from mlem_dist.ladder.images import Images, load_images
from mlem_dist.ladder.latents import in_batches
from mlem_dist.models.decoder import Decoder, load_decoder
from mlem_dist.models.devices import default_device
from mlem_dist.models.encoder import Encoder, Text, load_encoder
from mlem_dist.models.pixels import to_range
from mlem_dist.models.weights import save_tensors
from mlem_dist.solver.condition import MASK, TEXT, Condition
from mlem_dist.training.config import TrainConfig

Conditions = Callable[[Tensor], Condition]
"""Function from numbers of classes or captions, int64 (B,), to their condition; the number after the last is none."""

LATENTS = "latents"
"""Name of the folder of latents in that of the training state."""


def training_images(config: TrainConfig, data: Path, work: Path) -> Images:
    """The images of a dataset as the configuration says; with a pipeline, as latents.

    Latents are kept in the folder `work`, for later calls.

    Raises:
        UsageError: as for `load_images`.
    """
    around = config.around
    if around is None:
        return load_images(data, config.image_shape, config.labels)
    captions = config.captions if around.encoder else ""
    return load_images(data, config.image_shape, config.labels, captions, LatentEncoder(around, work / LATENTS))


class LatentEncoder:
    """Images to latents by a pipeline's autoencoder; latents of the same images are read from a folder."""

    def __init__(self, around: Surroundings, folder: Path) -> None:
        entry = around.decoder_entry()
        assert entry
        assert around.decoder
        self._digest, self._folder = str(sorted(entry["sha256"].items())), folder
        self._kind, self._path = str(entry["kind"]), around.decoder
        self._decoder: Decoder | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Latents, float16 (n, c, h, w), of images, uint8 (n, 3, H, W)."""
        digest = hashlib.sha256(f"{self._digest} {images.shape}".encode())
        digest.update(images.data)
        path = self._folder / f"{digest.hexdigest()[:32]}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {LATENTS: self._encoded(torch.from_numpy(images)).contiguous()})
        return load_file(path)[LATENTS].numpy()

    def _encoded(self, images: Tensor) -> Tensor:
        device = default_device()
        if self._decoder is None:
            self._decoder = load_decoder(self._kind, self._path, "float32").to(device)
        decoder = self._decoder
        index = torch.arange(len(images))
        return torch.cat(
            in_batches(index, lambda part: decoder.latents(to_range(images[part].to(device))).half().cpu())
        )


def conditions_of(config: TrainConfig, images: Images, device: str) -> Conditions:
    """The conditions of images; those of captions are made by the pipeline's text encoders on `device`."""
    around = config.around
    if around is None or not images.captions:
        return images.condition
    encoder = _encoder(around.folder, around.kind, config.image_shape[1:], device)
    texts: list[Text] = [*images.captions, None]

    def conditions(label: Tensor) -> Condition:
        return _trimmed(encoder([texts[number] for number in label.tolist()], [None] * len(label)))

    return conditions


@cache
def _encoder(folder: Path, kind: str, size: tuple[int, int], device: str) -> Encoder:
    """The text encoders of a pipeline, which take gigabytes and seconds to load, once for all levels of a process."""
    return load_encoder(folder, kind, size, False, device, "bfloat16" if device == "cuda" else "float32")


def _trimmed(condition: Condition) -> Condition:
    """The condition without the tokens at the end that a mask excludes for all samples."""
    if MASK not in condition:
        return condition
    length = 1 + int(condition[MASK].any(0).nonzero().max())
    return {name: value[:, :length] if name in (TEXT, MASK) else value for name, value in condition.items()}
