"""Conversion of 8-bit images to samples in a ladder's value range."""

from __future__ import annotations

from torch import Tensor


def to_range(images: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """The uint8 images as float32 in a ladder's value range."""
    low, high = value_range
    return images.float() / (255 / (high - low)) + low
