"""Checkpoints in single files, as fine-tunes of Stable Diffusion are published, converted to folders of diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mlem_dist.errors import UsageError
from mlem_dist.extras import require
from mlem_dist.files import read_object
from mlem_dist.ladder.hub import fetch_configuration
from mlem_dist.ladder.sit_file import LABELS, convert_sit
from mlem_dist.models.encoder import ENCODERS
from mlem_dist.models.imports import quiet_diffusers

UNET = "model.diffusion_model."
"""Beginning of the names of a UNet's tensors in a file."""

FIRST = f"{UNET}input_blocks.0.0.weight"
"""The name of the tensor by which a file with such a UNet is known."""

HALVES: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Data types that are kept if all tensors of a file have the same; others become float32."""


def convert(text: str, folder: Path, around: Path | None) -> Path:
    """Write a checkpoint in a single file to a new folder as `save_pretrained` of its pipeline writes it.

    Returns the folder of the model, or of its pipeline if there is a new one around it.

    Args:
        text: the file's path, as the user gave it.
        folder: the new folder.
        around: folder of the pipeline around the model: only the UNet is taken, to `folder`/unet, in its configuration;
            None for the whole pipeline of the file, in the configuration that diffusers finds on the hub. For SiT, see
            `convert_sit`.

    Raises:
        UsageError: if the configuration cannot be had, or does not fit the file.
    """
    tensors = load_file(text)
    if LABELS in tensors:
        return convert_sit(text, tensors, _dtype(text), folder, around)
    config = around or _configuration(text, tensors)
    options = {"config": str(config), "local_files_only": True, "torch_dtype": _dtype(text)}
    with quiet_diffusers(), _converting(text):
        model = _unet(text, options) if around else _pipeline(text, config, options)
        parts = {"unet": model} if around else model.components
        _check_complete(text, tensors, {name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        model.save_pretrained(folder / "unet" if around else folder, safe_serialization=True)
    # Safetensors restricts the permission to read to the user.
    mode = (folder / "unet" / "config.json").stat().st_mode
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)
    return folder / "unet" if around else folder


def _configuration(text: str, tensors: Mapping[str, Tensor]) -> Path:
    """The folder of the pipeline's configuration, from the repository on the hub that diffusers infers."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    require("transformers", "prompts", "text")
    name = fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    try:
        return fetch_configuration(name)
    except UsageError as error:
        raise UsageError(
            f"model {text!r}: its configuration is that of {error}, or give as `pipeline` a folder of a pipeline with "
            "this configuration, from which the ladder then takes all but the UNet"
        ) from None


def _dtype(text: str) -> torch.dtype:
    """The data type of the tensors in a file, in which they are stored again."""
    with safe_open(text, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not a mapping
    # Some files have the numbers of positions.
    kinds -= {"I32", "I64"}
    return HALVES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _unet(text: str, options: Mapping[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    config = read_object(Path(options["config"]) / "unet" / "config.json", "configuration of the UNet")
    if (kind := config.get("_class_name")) != UNet2DConditionModel.__name__:
        raise UsageError(
            f"model {text!r}: the model of the pipeline {options['config']} is a {kind}, expected that of a pipeline "
            "of Stable Diffusion 1, 2 or XL; give another one as `pipeline`"
        )
    return UNet2DConditionModel.from_single_file(text, subfolder="unet", **options)


def _pipeline(text: str, config: Path, options: Mapping[str, Any]) -> Any:
    import diffusers

    kind = str(read_object(config / "model_index.json", "pipeline").get("_class_name"))
    if kind not in ENCODERS:
        raise UsageError(f"model {text!r}: diffusers takes it for a {kind}, expected one of {', '.join(ENCODERS)}")
    return getattr(diffusers, kind).from_single_file(text, feature_extractor=None, **options)


@contextmanager
def _converting(text: str) -> Iterator[None]:
    """Turn errors of diffusers into one sentence.

    Raises:
        UsageError: if the file cannot be converted.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        # The text of a KeyError is the missing name alone.
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        reason = lacks + (" ".join(str(error).split())[:300] or type(error).__name__)
        raise UsageError(
            f"model {text!r} cannot be converted: {reason}; give the pipeline of the model that it was made from as "
            "`pipeline`"
        ) from None


def _check_complete(text: str, tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> None:
    """Refuse a conversion with a tensor that is none of the file: diffusers leaves those at random values."""
    states = {name: part.state_dict() for name, part in parts.items()}
    dtype = next(iter(states["unet"].values())).dtype
    known = {_digest(tensor.to(dtype)) for tensor in _stored(tensors)}
    for part, state in states.items():
        for name, tensor in state.items():
            if tensor.is_floating_point() and (tensor.is_meta or _digest(tensor) not in known):
                raise UsageError(
                    f"model {text!r} cannot be converted: it lacks {name} of the {part}; take a complete file"
                )
    count = sum(name.startswith(UNET) for name in tensors)
    if count != len(states["unet"]):
        raise UsageError(
            f"model {text!r} cannot be converted: its UNet has {count} tensors, expected {len(states['unet'])}, as in "
            "its configuration; give the pipeline of the model that it was made from as `pipeline`"
        )


def _stored(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The tensors of a file, and those that diffusers makes of them."""
    for name, tensor in tensors.items():
        yield tensor
        if ".in_proj_" in name:
            yield from tensor.chunk(3)
        elif name.endswith("text_projection"):
            yield tensor.T


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()
