"""Weights in safetensors files."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.extras import require
from mlem_dist.files import read_object, replace_file
from mlem_dist.models.imports import quiet_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

SAFE: Mapping[str, bool] = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
"""Arguments with which diffusers reads no pickle and asks no server, and does not need the package accelerate."""

QUANTISED = "quantization_config"
"""Key of a model's configuration that says how its weights are quantised."""

VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)[.-]")
"""Pattern of the variant in the name of a file of weights."""


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with the permissions of any new file.

    Raises:
        OSError: if the disk is full or not writable.
    """

    def write(temporary: Path) -> None:
        # Safetensors would restrict read permission to the user.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        temporary.chmod(mode)

    replace_file(path, write)


def variant_of(folder: Path) -> str | None:
    """The variant of a model's weights, such as "fp16" in `diffusion_pytorch_model.fp16.safetensors`.

    None if the folder has weights without a variant, or those of no or several variants.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() or not folder.is_dir():
        return None
    # Shards of a variant are found by its index.
    pattern = r"diffusion_pytorch_model\.(?:safetensors\.index\.)?(\w+)\.(?:safetensors|json)"
    names = (re.fullmatch(pattern, file.name) for file in folder.iterdir())
    variants = {match[1] for match in names if match}
    return variants.pop() if len(variants) == 1 else None


def chosen_weights(names: Sequence[str]) -> list[str]:
    """The files of weights that are read: those of no variant, such as "fp16" in `model.fp16.safetensors`, if any."""
    return [name for name in names if not VARIANT.search(name)] or list(names)


def weight_names(folder: Path) -> tuple[str, str]:
    """The names of a model's index of shards and of its only file of weights; one of them is there."""
    if variant := variant_of(folder):
        return f"{WEIGHTS}.index.{variant}.json", WEIGHTS.replace(".safetensors", f".{variant}.safetensors")
    return INDEX, WEIGHTS


def load_model(kind: Any, folder: Path, precision: str) -> Any:
    """A model of a class of diffusers, with weights of dtype `precision` from a folder; pickles are never read.

    Quantised weights stay quantised.

    Raises:
        UsageError: if the configuration is unreadable, or the weights are quantised and a package for them is missing.
        ValueError: if the weights do not match the configuration.
        OSError: if files are missing or unreadable.
    """
    dtype = getattr(torch, precision)
    quantisation = read_object(folder / "config.json", "model configuration").get(QUANTISED)
    further: dict[str, Any] = {}
    context: AbstractContextManager[None] = nullcontext()
    if quantisation:
        require_quantisation(quantisation["quant_method"])
        further = {"low_cpu_mem_usage": True}
        if quantisation["quant_method"] == "bitsandbytes":
            context, further = bitsandbytes_without_gpu(), further | {"device_map": {"": "cpu"}}
    with quiet_diffusers(), context:
        model, info = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=variant_of(folder),
            output_loading_info=True,
            **{**SAFE, **further},
        )
        # Diffusers keeps the file's dtype if it is right for the first tensor, in SD3 a table of positions in float32.
        if not quantisation:
            model.to(dtype)
    # Diffusers only warns, and leaves missing weights at random values.
    for what, names in (("lack", info["missing_keys"]), ("hold what it does not know,", info["unexpected_keys"])):
        if names:
            raise ValueError(f"its weights {what} {sorted(names)[0]}; restore them, or its config.json")
    return model


def require_quantisation(method: str) -> None:
    """Refuse models that are quantised by one of `METHODS` if a package that they need is missing.

    Raises:
        UsageError: if accelerate or the method's package is not installed.
    """
    for package in ("accelerate", method):
        require(package, "quantised models", "quantised")


@contextmanager
def bitsandbytes_without_gpu() -> Iterator[None]:
    """Load weights that are quantised by bitsandbytes on a CPU, too, which the package supports and diffusers refuses.

    What else diffusers checks is that the packages are there. Of 8-bit layers, each call would log a warning.
    """
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    classes: tuple[Any, ...] = bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer
    checks = [kind.validate_environment for kind in classes]
    for kind in classes:
        kind.validate_environment = lambda *arguments, **further: None
    try:
        yield
    finally:
        for kind, check in zip(classes, checks, strict=True):
            kind.validate_environment = check


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn errors of loading weights into an error that names `what` is loaded.

    Raises:
        UsageError: if loading fails; the message says so if memory does not suffice.
    """
    try:
        yield
    except UsageError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "allocation failed"
        raise UsageError(f"{what} does not fit into memory: {reason}; take a smaller precision or device") from None
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        if "can't allocate memory" in str(error):
            raise UsageError(f"{what} does not fit into memory; take a smaller precision or another machine") from None
        raise UsageError(f"{what} cannot be loaded: {' '.join(str(error).split())}") from None
