"""The safety checker of a pipeline: whether images are unsafe, by a model of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mlem_dist.errors import UsageError
from mlem_dist.extras import require
from mlem_dist.models.imports import quiet_diffusers
from mlem_dist.models.weights import VARIANT, chosen_weights

CHECKER, EXTRACTOR = "safety_checker", "feature_extractor"
"""Folders of the safety checker and of its inputs' configuration in a pipeline."""

KIND = "StableDiffusionSafetyChecker"


class SafetyChecker:
    """The safety checker of a pipeline, which looks at images and changes none.

    Args:
        folder: folder of the pipeline.
        device: where the model computes.

    Raises:
        UsageError: if the package transformers is not installed.
        ValueError, OSError: if its weights are not whole.
    """

    def __init__(self, folder: Path, device: str) -> None:
        require("transformers", "safety checkers", "text")
        from diffusers.pipelines.stable_diffusion import safety_checker
        from transformers import CLIPImageProcessor

        with quiet_diffusers():
            model, info = getattr(safety_checker, KIND).from_pretrained(
                folder / CHECKER,
                variant=_variant(folder),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            self._extract: Any = CLIPImageProcessor.from_pretrained(folder / EXTRACTOR, local_files_only=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]}; restore them")
        self._model, self._device = model.float().eval().to(device), device

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Whether each of the images, uint8 (B, H, W, 3), is unsafe, bool (B,)."""
        pictures = [Image.fromarray(image) for image in images]
        values = self._extract(pictures, return_tensors="pt").pixel_values.to(self._device)
        with quiet_diffusers():
            # The model blackens the images that come with the values, which are none of ours.
            _, unsafe = self._model(clip_input=values, images=np.zeros((len(pictures), 1)))
        return np.array(unsafe, dtype=bool)


def _weights(folder: Path) -> list[str]:
    return chosen_weights([file.name for file in (folder / CHECKER).glob("*.safetensors")])


def _variant(folder: Path) -> str | None:
    match = VARIANT.search(_weights(folder)[0])
    return match[1] if match else None


def checker_files(folder: Path) -> list[str]:
    """The paths of the files that a safety checker is loaded from, relative to the pipeline's folder.

    Raises:
        UsageError: if it has no weights in safetensors files, or a file is missing.
    """
    again = (
        "load the pipeline by diffusers and save it again by `save_pretrained`, with `safety_checker=None` if images "
        "need no check"
    )
    if not (weights := _weights(folder)):
        raise UsageError(f"{folder / CHECKER} has no weights in safetensors files; {again}")
    names = [f"{EXTRACTOR}/preprocessor_config.json", *(f"{CHECKER}/{name}" for name in ("config.json", *weights))]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UsageError(f"{folder} has a safety checker, but no {missing[0]}; restore it, or {again}")
    return names
