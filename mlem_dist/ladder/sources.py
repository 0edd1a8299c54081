"""Where the models of a new ladder come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlem_dist.errors import UsageError
from mlem_dist.files import read_object
from mlem_dist.ladder.checks import check_model_folder, model_files
from mlem_dist.ladder.hub import fetch_pipeline, is_hub_id
from mlem_dist.ladder.remote import fetch_folder, is_url
from mlem_dist.ladder.schema import LADDER
from mlem_dist.ladder.single_file import FIRST
from mlem_dist.ladder.sit_file import LABELS
from mlem_dist.models.families import FAMILIES, config_kind, family_of
from mlem_dist.models.families.family import Family
from mlem_dist.models.imports import METHODS
from mlem_dist.models.weights import QUANTISED, require_quantisation
from mlem_dist.store import parse_location

PARTS = ("transformer", "unet")
"""Names under which pipelines keep their model."""

OTHERS: Mapping[str, str] = {
    "ControlNetModel": "a ControlNet steers another model by a picture; take that model alone",
    "AutoencoderDC": "an autoencoder is a part of a pipeline; give the pipeline's folder",
    "AutoencoderKL": "an autoencoder is a part of a pipeline; give the pipeline's folder",
}
"""Reasons for classes of models that are not drifts, and the way out."""

DISTILLED: Mapping[str, str] = {
    "SanaSprintPipeline": "SANA-Sprint is distilled to a few steps of another parametrisation; take the folder of a "
    "SanaPipeline"
}
"""Reasons for classes of pipelines whose models are not drifts, and the way out."""

FUSE = (
    "`pipeline.load_lora_weights(FILE)`, `pipeline.fuse_lora()`, `pipeline.unload_lora_weights()` and "
    "`pipeline.save_pretrained(FOLDER)`, and take that folder"
)
"""Lines of diffusers that fuse a LoRA into its pipeline."""

FILES: Mapping[str, str] = {
    "lora": f"a LoRA, expected a model; load its pipeline by diffusers, then {FUSE}",
    "ip_adapter": "an IP-Adapter, which steers a model by a picture; take that model alone",
    "control_model": "a ControlNet, which steers a model by a picture; take that model alone",
}
"""Reasons for files by a part of the names of their tensors, and the way out."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Suffixes of files that are not read, as this may run code."""

LINES = "`pipeline = StableDiffusionPipeline.from_single_file(FILE)`, then `pipeline.save_pretrained(FOLDER)`"
"""Lines of diffusers that convert a checkpoint in a single file."""


@dataclass(frozen=True)
class Source:
    """A model of diffusers.

    Attributes:
        text: how the user named it.
        name: a short name.
        folder: the model's folder on this machine.
        pipeline: the folder of the pipeline of which it is a part, on this machine; None if it is alone.
        prediction: its prediction, if a ladder says so; "" for that of its pipeline's scheduler.
        patch: factor of the pixel-unshuffle before it.
        pinned: the path of the repository on the hub, or the URL, that holds them; "" if they are on this machine.
        family: its family.
        config: its configuration.
    """

    text: str
    name: str
    folder: Path
    pipeline: Path | None
    family: Family
    config: Mapping[str, Any]
    prediction: str = ""
    patch: int = 1
    pinned: str = ""

    def path(self, folder: Path) -> str:
        """How `ladder.json` refers to a folder of the model or of its pipeline."""
        return stored_path(folder, self.pipeline or self.folder, self.pinned)


def stored_path(folder: Path, root: Path, pinned: str) -> str:
    """The path of `folder` in `ladder.json`; `pinned` is that of `root`, which holds it, if it is elsewhere."""
    if not pinned:
        return str(folder)
    return "/".join([pinned, *folder.relative_to(root).parts])


def find_source(text: str, converted: Path | None = None) -> Source:
    """The model in a folder as `save_pretrained` of a pipeline or of a model writes it, or in a repository on the hub.

    The folder may be in an object store, by its URL.

    `converted` is the folder of the model if `text` names a single file, which has been converted.

    Raises:
        UsageError: if there is no model, or it cannot be used.
    """
    folder, pinned = (converted, "") if converted else find_folder(text, "model")
    if (folder / "model_index.json").is_file():
        return replace(_part(text, folder), pinned=pinned)
    if not (folder / "config.json").is_file():
        for file in sorted(folder.glob("*.safetensors")):
            if reason := _other_reason(_tensor_names(file)):
                raise UsageError(f"model {text!r} is {reason}")
        raise UsageError(f"model {text!r} has neither model_index.json nor config.json, expected a folder of diffusers")
    if pinned:
        return replace(_source(text, text.rpartition("/")[2], folder, None), pinned=pinned)
    if (folder.parent / LADDER).is_file():
        return _level(text, folder)
    pipeline = folder.parent if (folder.parent / "model_index.json").is_file() else None
    return _source(text, (pipeline or folder).name, folder, pipeline)


def find_file(text: str) -> Path | None:
    """The checkpoint in a single file that a text names; None if it does not name a file.

    Raises:
        UsageError: if the file holds something else, or may run code.
    """
    file = parse_location(text, "model") if is_url(text) else Path(text)
    if not isinstance(file, Path) or not file.is_file():
        return None
    if reason := _file_reason(file):
        raise UsageError(f"model {text!r} is {reason}")
    return file


def _level(text: str, folder: Path) -> Source:
    """The model in a ladder's folder, with what the ladder says of it."""
    levels = read_object(folder.parent / LADDER, "ladder").get("levels", [])
    entry = next((level for level in levels if level.get("path") == folder.name), None)
    if entry is None:
        raise UsageError(f"model {text!r}: {folder.parent / LADDER} has no level of it")
    if entry.get("prediction") == "residual":
        raise UsageError(
            f"model {text!r}: it corrects a Gaussian level, and cannot leave its ladder; take one that predicts the "
            "noise, v or the image"
        )
    source = _source(text, folder.name, folder, folder.parent)
    return replace(source, prediction=str(entry.get("prediction", "")), patch=int(entry.get("patch", 1)))


def find_folder(text: str, what: str) -> tuple[Path, str]:
    """The folder on this machine that a text names, by its path, by a URL or by an id on the hub.

    With it comes its path in `ladder.json`, if it is from a store or the hub, else "".

    Raises:
        UsageError: if there is no such folder.
    """
    folder = parse_location(text, what.strip("`")) if is_url(text) else Path(text)
    if not isinstance(folder, Path):
        return fetch_folder(folder, what), str(folder).rstrip("/")
    if folder.is_file():
        reason = (
            _file_reason(folder) or f"a file, expected a folder; load it by diffusers, {LINES}, and take that folder"
        )
        raise UsageError(f"{what} {text!r} is {reason}")
    if folder.exists():
        return folder.resolve(), ""
    if is_hub_id(text):
        pinned, snapshot = fetch_pipeline(text)
        return snapshot, pinned
    raise UsageError(
        f"{what} {text!r}: there is no such folder; expected the folder of a pipeline or of a model, its URL, or an "
        "id on the hub such as OWNER/NAME or OWNER/NAME@REVISION"
    )


def _file_reason(file: Path) -> str:
    """The reason why a file is not taken as a checkpoint, and the way out, for a message; "" if it is."""
    if file.suffix in PICKLES:
        return (
            f"a pickle, which may run code when it is read; load it by diffusers, {LINES}, and take that folder, or "
            "make a file of SiT by `safetensors.torch.save_file(torch.load(FILE, weights_only=True), OTHER)`"
        )
    names = _tensor_names(file) if file.suffix == ".safetensors" else []
    if reason := _other_reason(names):
        return reason
    if FIRST in names or LABELS in names:
        return ""
    return (
        "a file without a UNet of Stable Diffusion or a transformer of SiT, expected a checkpoint of Stable Diffusion "
        "1, 2 or XL or of SiT in one .safetensors file, or a folder as `save_pretrained` writes it"
    )


def _tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file; none if it is unreadable."""
    with suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
        return list(tensors.keys())
    return []


def _other_reason(names: Sequence[str]) -> str:
    """The reason of `FILES` by which tensors of these names are no model; "" if there is none."""
    return next((reason for word, reason in FILES.items() if any(word in name for name in names)), "")


def _part(text: str, pipeline: Path) -> Source:
    """The model that is a part of a pipeline."""
    index = read_object(pipeline / "model_index.json", "pipeline")
    kind = str(index.get("_class_name"))
    if kind in DISTILLED:
        raise UsageError(f"model {text!r}: {DISTILLED[kind]}")
    for part in PARTS:
        if isinstance(index.get(part), list) and index[part][1] is not None:
            return _source(text, text.rstrip("/").rpartition("/")[2].partition("@")[0], pipeline / part, pipeline)
    raise UsageError(f"model {text!r}: a {kind} has no {' or '.join(PARTS)}; choose another pipeline")


def _source(text: str, name: str, folder: Path, pipeline: Path | None) -> Source:
    config = read_object(folder / "config.json", "model configuration")
    kind = config_kind(config)
    if kind not in FAMILIES and kind in OTHERS:
        raise UsageError(f"model {text!r}: {OTHERS[kind]}")
    family = family_of(kind, f"model {text!r}")
    check_model_folder(f"model {text!r}", family.names[0], folder)
    if QUANTISED in config:
        _check_quantisation(text, config[QUANTISED])
    files = [folder / file for file in model_files(folder) if file.endswith(".safetensors")]
    if any("lora_" in name for file in files for name in _tensor_names(file)):
        raise UsageError(
            f"model {text!r}: its weights hold a LoRA beside those of the model; load its pipeline again, then {FUSE}"
        )
    return Source(text, name, folder, pipeline, family, config)


def _check_quantisation(text: str, config: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are quantised by none of `METHODS`."""
    if (method := config.get("quant_method")) not in METHODS:
        raise UsageError(
            f"model {text!r} is quantised by {method}, expected {' or '.join(METHODS)}; quantise the original by "
            "`TorchAoConfig` of diffusers, or take it as it is, in bfloat16"
        )
    require_quantisation(method)
