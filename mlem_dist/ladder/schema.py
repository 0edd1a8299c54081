"""The entries of `ladder.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, get_origin, get_type_hints

SCHEMA_VERSION = 1
LADDER = "ladder.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@dataclass(frozen=True)
class Level:
    """One level's entry in `ladder.json`.

    Attributes:
        name: unique in the ladder.
        kind: "gaussian" or "unet".
        path: relative to the ladder folder; a safetensors file for a Gaussian, a folder for a UNet.
        patch: factor of the pixel-unshuffle before a UNet, 1 for none.
        prediction: meaning of a UNet's output: one of `conversion.PREDICTIONS` or "residual", see `UNetLevel`.
        corrects: name of the Gaussian level that a residual corrects; "" for the first level, and for other levels.
        parameters: number of stored values.
        sha256: hex digest of each file, by path relative to the ladder folder.
        seconds: measured cost T_k, seconds per sample of one evaluation, by device type.
        denoising_error: mean squared error per value of the drift on held-out data, by equal bands of noise.
    """

    name: str
    kind: str
    path: str
    parameters: int
    sha256: dict[str, str]
    patch: int = 1
    prediction: str = "epsilon"
    corrects: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    denoising_error: list[float] = field(default_factory=list)


def parse_sample_shape(values: Any) -> tuple[int, int, int]:
    """The shape (C, H, W) of a sample.

    Raises:
        ValueError: if C is neither 1 nor 3, or a side is not positive.
    """
    channels, height, width = map(int, values)
    if channels not in (1, 3) or min(height, width) < 1:
        raise ValueError(f"sample_shape is {values}, expected [1 or 3, height, width], as images are grey or RGB")
    return channels, height, width


def parse_value_range(values: Any) -> tuple[float, float]:
    """The interval of a finished sample's values.

    Raises:
        ValueError: if the interval is empty or not finite.
    """
    low, high = map(float, values)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"value_range is {values}, expected [low, high]")
    return low, high


def parse_level(raw: Any) -> Level:
    """A level's entry, after a check of the types of its values.

    Raises:
        TypeError: if a key is missing or unknown, or a value has the wrong type.
        ValueError: if the patch is not positive.
    """
    level = Level(**raw)
    for key, kind in get_type_hints(Level).items():
        if not isinstance(getattr(level, key), get_origin(kind) or kind):
            raise TypeError(f"{key} of level {level.name!r} is {getattr(level, key)!r}")
    for number in (*level.seconds.values(), *level.denoising_error):
        if not isinstance(number, int | float):
            raise TypeError(f"level {level.name!r} has {number!r} for a number")
    if level.patch < 1:
        raise ValueError(f"patch of level {level.name!r} is {level.patch}, expected at least 1")
    return level
