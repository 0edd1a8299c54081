"""Where the models of a new ladder come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlem_dist.errors import UsageError
from mlem_dist.files import read_object
from mlem_dist.ladder.checks import check_model_folder
from mlem_dist.models.families import FAMILIES, config_kind, family_of
from mlem_dist.models.families.family import Family

PARTS = ("transformer", "unet")
"""Names under which pipelines keep their model."""

OTHERS: Mapping[str, str] = {
    "ControlNetModel": "a ControlNet steers another model by a picture; take that model alone",
    "AutoencoderKL": "an autoencoder is a part of a pipeline; give the pipeline's folder",
}
"""Reasons for classes of models that are not drifts, and the way out."""


@dataclass(frozen=True)
class Source:
    """A model of diffusers.

    Attributes:
        text: how the user named it.
        name: a short name.
        folder: the model's folder.
        pipeline: the folder of the pipeline of which it is a part; None if it is alone.
        family: its family.
        config: its configuration.
    """

    text: str
    name: str
    folder: Path
    pipeline: Path | None
    family: Family
    config: Mapping[str, Any]


def find_source(text: str) -> Source:
    """The model in a folder as `save_pretrained` of a pipeline or of a model writes it.

    Raises:
        UsageError: if there is no model, or it cannot be used.
    """
    folder = Path(text)
    if not folder.exists():
        raise UsageError(f"model {text!r}: there is no such folder; expected the folder of a pipeline or of a model")
    if folder.is_file():
        raise UsageError(f"model {text!r} is a file, expected the folder of a pipeline or of a model of diffusers")
    folder = folder.resolve()
    if (folder / "model_index.json").is_file():
        return _part(text, folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"model {text!r} has neither model_index.json nor config.json, expected a folder of diffusers")
    pipeline = folder.parent if (folder.parent / "model_index.json").is_file() else None
    return _source(text, (pipeline or folder).name, folder, pipeline)


def _part(text: str, pipeline: Path) -> Source:
    """The model that is a part of a pipeline."""
    index = read_object(pipeline / "model_index.json", "pipeline")
    for part in PARTS:
        if isinstance(index.get(part), list) and index[part][1] is not None:
            return _source(text, pipeline.name, pipeline / part, pipeline)
    raise UsageError(
        f"model {text!r}: a {index.get('_class_name')} has no {' or '.join(PARTS)}; choose another pipeline"
    )


def _source(text: str, name: str, folder: Path, pipeline: Path | None) -> Source:
    config = read_object(folder / "config.json", "model configuration")
    kind = config_kind(config)
    if kind not in FAMILIES and kind in OTHERS:
        raise UsageError(f"model {text!r}: {OTHERS[kind]}")
    family = family_of(kind, f"model {text!r}")
    check_model_folder(f"model {text!r}", family.names[0], folder)
    return Source(text, name, folder, pipeline, family, config)
