"""The entries of `ladder.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, get_origin, get_type_hints

SCHEMA_VERSION, MODELS_VERSION = 1, 2
"""Versions of the schema: 1 for levels with their files in the ladder's folder, 2 for levels that refer to models."""

LADDER = "ladder.json"
SCHEDULER = "scheduler/scheduler_config.json"


PRECISIONS = ("float32", "bfloat16", "float16")
"""Data types of models' weights and activations, by torch's names."""

OPERATIONS = "operations"
"""Key of costs that are counted, in place of a device type for which they are measured: 1e12 operations per sample."""

OWN = "own"
"""The precision of a job in which each model computes in its own."""


@dataclass(frozen=True)
class Guidance:
    """Guidance of a level; see `GuidedLevel`.

    Attributes:
        scale: the guidance scale w; 1 for no guidance.
        start: where the guided part of the noise schedule starts, from 0, pure noise, to 1, the image.
        stop: where it stops.
        by: name of the model that gives the direction; "" for the level's own.
        embedded: whether the scale is an input of the model, instead of the weight of a direction.
        weight: the guidance scale of a direction beside a scale that is an input; 1 for none.
    """

    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    by: str = ""
    embedded: bool = False
    weight: float = 1.0

    @property
    def directed(self) -> bool:
        """Whether there is a direction, from evaluations with and without the condition."""
        return self.weight != 1 if self.embedded else self != UNGUIDED


UNGUIDED = Guidance()


@dataclass(frozen=True)
class Level:
    """One level's entry in `ladder.json`, with that of its model.

    Attributes:
        name: unique in the ladder.
        kind: "gaussian", or the class of its model in diffusers; in version 1 of the schema "unet" for `UNet2DModel`.
        path: a safetensors file for a Gaussian, a folder for a model; relative to the ladder folder or absolute.
        patch: factor of the pixel-unshuffle before a model, 1 for none.
        prediction: meaning of a model's output: one of `conversion.PREDICTIONS` or "residual", see `ModelLevel`.
        precision: dtype in which its model computes, unless a job names another one.
        corrects: name of the Gaussian level that a residual corrects; "" for the first level, and for other levels.
        guidance: guidance of the level.
        model: name of its model; "" in version 1 of the schema, where each level has its own.
        parameters: number of stored values.
        sha256: hex digest of each file, by path relative to the ladder folder or absolute.
        seconds: measured cost T_k, seconds per sample of one evaluation, by device type.
        denoising_error: mean squared error per value of the drift on held-out data, by equal bands of noise.
        activation_bytes: bytes per sample of an evaluation's activations in `precision`; 0 if they are not known, and
            for a Gaussian, for which they are few.
        quantised_bytes: bytes of the weights of a quantised model; 0 if the weights are of `precision`.
    """

    name: str
    kind: str
    path: str
    parameters: int
    sha256: dict[str, str]
    patch: int = 1
    prediction: str = "epsilon"
    corrects: str = ""
    precision: str = "float32"
    guidance: Guidance = UNGUIDED
    model: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    denoising_error: list[float] = field(default_factory=list)
    activation_bytes: int = 0
    quantised_bytes: int = 0


def parse_sample_shape(values: Any, latent: bool = False) -> tuple[int, int, int]:
    """The shape (C, H, W) of a sample: an image, or the latents of one.

    Raises:
        ValueError: if C is not positive, or for images neither 1 nor 3, or a side is not positive.
    """
    channels, height, width = map(int, values)
    if min(channels, height, width) < 1 or (channels not in (1, 3) and not latent):
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


@dataclass(frozen=True)
class Part:
    """A part of a pipeline beside the models of the levels: its decoder, or its encoder of prompts.

    Attributes:
        kind: the class of the decoder, or of the pipeline.
        path: the folder of the decoder, or of the pipeline; relative to the ladder folder or absolute.
        sha256: hex digest of each file, by path relative to `path`.
        parameters: number of stored values.
        seconds: seconds per sample, by device type.
    """

    kind: str
    path: str
    sha256: dict[str, str]
    parameters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def level_entry(level: Level) -> dict[str, Any]:
    """A level of a trained ladder as JSON-ready values."""
    own = ("precision", "guidance", "model", "quantised_bytes")
    return {key: value for key, value in level.__dict__.items() if key not in own}


def parse_levels(raw: Mapping[str, Any]) -> tuple[Level, ...]:
    """The levels in the content of `ladder.json`, of either version.

    Raises:
        KeyError: if a level's model is missing.
        TypeError, ValueError: as for `parse_level`.
    """
    if raw["schema_version"] == SCHEMA_VERSION:
        return tuple(map(parse_level, raw["levels"]))
    models = {str(model["name"]): model for model in raw["models"]}
    levels = []
    for entry in raw["levels"]:
        model = {key: value for key, value in models[entry["model"]].items() if key != "name"}
        folder = str(PurePath(model["path"]).parent) if model["kind"] == "gaussian" else str(model["path"])
        model["sha256"] = {joined(folder, name): digest for name, digest in model["sha256"].items()}
        guidance = Guidance(**entry.get("guidance", {}))
        levels.append(parse_level({**entry, **model, "guidance": guidance}))
    return tuple(levels)


def joined(folder: str, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{folder}/{name}" if "://" in folder else str(PurePath(folder) / name)


def parse_level(raw: Any) -> Level:
    """A level's entry, after a check of the types of its values.

    Raises:
        TypeError: if a key is missing or unknown, or a value has the wrong type.
        ValueError: if the patch is not positive, or the precision is unknown.
    """
    level = Level(**raw)
    for key, kind in get_type_hints(Level).items():
        if not isinstance(getattr(level, key), get_origin(kind) or kind):
            raise TypeError(f"{key} of level {level.name!r} is {getattr(level, key)!r}")
    for number in (*level.seconds.values(), *level.denoising_error):
        if not isinstance(number, int | float):
            raise TypeError(f"level {level.name!r} has {number!r} for a number")
    if level.precision not in PRECISIONS:
        raise ValueError(f"precision of level {level.name!r} is {level.precision!r}, expected {', '.join(PRECISIONS)}")
    if level.patch < 1:
        raise ValueError(f"patch of level {level.name!r} is {level.patch}, expected at least 1")
    return level
