"""Writing of a ladder's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlem_dist.files import file_digest, replace_file
from mlem_dist.ladder.checks import read_process
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import LADDER, SCHEDULER, SCHEMA_VERSION, Level, level_entry
from mlem_dist.models.families.unet import UNet
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.level import ModelLevel
from mlem_dist.models.weights import WEIGHTS, save_tensors


def save_level(folder: Path, name: str, module: nn.Module, dtype: torch.dtype) -> Level:
    """Write a level's weights as `dtype` to a ladder folder, and return the level's entry for `ladder.json`."""
    stored = module.model if isinstance(module, ModelLevel) else module
    state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in stored.state_dict().items()}
    if isinstance(module, GaussianLevel):
        kind, path, patch, prediction = "gaussian", f"{name}.safetensors", 1, "epsilon"
        save_tensors(folder / path, state)
        written = [folder / path]
    elif isinstance(module, ModelLevel):
        model: Any = module.model
        kind = "unet" if isinstance(module.family, UNet) else module.family.names[0]
        path, patch, prediction = name, module.patch, module.prediction
        model.save_config(folder / path)
        weights = folder / path / WEIGHTS
        save_tensors(weights, state, {"format": "pt"})
        written = [folder / path / "config.json", weights]
    else:
        raise TypeError(f"no ladder format for a {type(module).__name__}")
    return Level(
        name=name,
        kind=kind,
        path=path,
        patch=patch,
        prediction=prediction,
        parameters=sum(value.numel() for value in state.values()),
        sha256={file.relative_to(folder).as_posix(): file_digest(file) for file in written},
    )


def save_ladder(
    folder: Path,
    name: str,
    sample_shape: Sequence[int],
    labels: Sequence[str],
    scheduler: dict[str, Any],
    levels: Sequence[Level],
) -> Ladder:
    """Write `scheduler_config.json` and `ladder.json` for levels from `save_level`, and return the loaded ladder."""
    config = scheduler
    if "_class_name" not in scheduler:
        config = {"_class_name": "DDPMScheduler", "prediction_type": "epsilon", "clip_sample": False} | scheduler
    replace_file(folder / SCHEDULER, json.dumps(config, indent=2) + "\n")
    raw = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "sample_shape": list(sample_shape),
        "value_range": [-1.0, 1.0],
        "labels": list(labels),
        "parametrisation": read_process(folder).drift,
        "scheduler_sha256": file_digest(folder / SCHEDULER),
        "levels": [level_entry(level) for level in levels],
    }
    replace_file(folder / LADDER, json.dumps(raw, indent=2) + "\n")
    return Ladder.load(folder)
