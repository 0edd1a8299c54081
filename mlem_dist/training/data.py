"""Image datasets for training, as uint8 tensors."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mlem_dist.errors import UsageError


@dataclass(frozen=True)
class Images:
    """Images as uint8 (n, C, H, W) with int64 labels (n,), in a training and a held-out part."""

    train: Tensor
    train_label: Tensor
    test: Tensor
    test_label: Tensor


def _idx(folder: Path, stem: str) -> np.ndarray:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            dims = raw[3]
            shape = np.frombuffer(raw, ">u4", dims, 4)
            if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * dims + int(shape.prod(dtype=np.int64)):
                raise UsageError(f"{path} is not a complete IDX file of bytes")
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    raise UsageError(f"no training data: {folder} has neither {stem} nor {stem}.gz (the four IDX files of MNIST)")


def _fit(images: Tensor, sample_shape: tuple[int, int, int], source: Path) -> Tensor:
    """Zero-pad centred to the sample shape."""
    channels, height, width = sample_shape
    _, c, h, w = images.shape
    if c != channels or h > height or w > width:
        raise UsageError(
            f"images in {source} have shape {(c, h, w)}, expected {channels} channels and at most {height}x{width}"
        )
    top, left = (height - h) // 2, (width - w) // 2
    return pad(images, (left, width - w - left, top, height - h - top))


def load_images(folder: Path, sample_shape: tuple[int, int, int], classes: int) -> Images:
    """Read the four IDX files of an MNIST-like dataset, plain or gzipped, padded to `sample_shape`.

    Raises:
        UsageError: a file is missing or broken, the images do not fit, or a label is out of range.
    """
    parts = []
    for part in ("train", "t10k"):
        images = torch.from_numpy(_idx(folder, f"{part}-images-idx3-ubyte").copy())
        label = torch.from_numpy(_idx(folder, f"{part}-labels-idx1-ubyte").astype(np.int64))
        if images.ndim != 3 or len(images) != len(label) or not len(label):
            raise UsageError(
                f"{folder}: {part} has images {tuple(images.shape)} and {len(label)} labels, expected one each"
            )
        if int(label.max()) >= max(classes, 1):
            raise UsageError(
                f"{folder}: label {int(label.max())} is out of range for the configuration's {classes} labels"
            )
        parts += [_fit(images[:, None], sample_shape, folder), label]
    return Images(*parts)
