"""Transformers of FLUX.1 (Black Forest Labs, https://github.com/black-forest-labs/flux)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mlem_dist.models.families.family import Config, Family
from mlem_dist.models.guidance import GUIDANCE
from mlem_dist.solver.condition import POOLED, TEXT, Condition
from mlem_dist.solver.process import Process

TOKENS = 512
"""Number of tokens of a text."""


class Flux(Family):
    """`FluxTransformer2DModel`, conditioned on a text by CLIP and T5 and, for FLUX.1 [dev], on the guidance scale."""

    names = ("FluxTransformer2DModel",)
    patch = 2
    even = True
    guided = False

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`."""
        pooled = condition[POOLED].to(x.dtype)
        scale = condition[GUIDANCE] if model.config.guidance_embeds else None
        return self.predict_tokens(model, x, t, condition[TEXT], pooled_projections=pooled, guidance=scale)

    def predict_tokens(self, model: Any, x: Tensor, t: Tensor, text: Tensor, **inputs: Tensor | None) -> Tensor:
        """As `predict`: the model's tokens are patches of x, with the numbers of their rows and columns.

        `text` (B, tokens, width) goes to the model in the dtype of x, and further `inputs` by their names.
        """
        small = pixel_unshuffle(x, self.patch)
        height, width = small.shape[2:]
        places = torch.zeros(height, width, 3, device=x.device)
        places[..., 1] = torch.arange(height, device=x.device)[:, None]
        places[..., 2] = torch.arange(width, device=x.device)
        out = model(
            small.flatten(2).transpose(1, 2),
            encoder_hidden_states=text.to(x.dtype),
            timestep=t.to(x.dtype) / 1000,
            img_ids=places.flatten(0, 1),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            return_dict=False,
            **inputs,
        )[0]
        return pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), self.patch)

    def refusal(self, config: Config, process: Process) -> str:
        """As `Family.refusal`."""
        given, made = config["in_channels"], config.get("out_channels") or config["in_channels"]
        if given != made:
            return (
                f"its model takes {given} channels and predicts {made}, as models of FLUX for filling, depth or edges "
                "do; take a model that makes images from text alone"
            )
        if (patch := config.get("patch_size", 1)) != 1:
            return f"patch_size of its model is {patch}, expected 1; take a model of FLUX.1 or Chroma"
        return ""

    def channels(self, config: Config) -> int:
        """As `Family.channels`."""
        return int(config["in_channels"]) // self.patch**2

    def size(self, config: Config) -> tuple[int, int]:
        """As `Family.size`: the default of the pipeline, as configurations do not say it."""
        return 128, 128

    def scale(self, config: Config) -> float | None:
        """As `Family.scale`."""
        return 3.5 if config.get("guidance_embeds") else None

    def inputs(self, config: Config) -> dict[str, tuple[int | None, ...]]:
        """As `Family.inputs`."""
        shapes: dict[str, tuple[int | None, ...]] = {
            TEXT: (TOKENS, int(config["joint_attention_dim"])),
            POOLED: (int(config["pooled_projection_dim"]),),
        }
        return shapes | ({GUIDANCE: ()} if config.get("guidance_embeds") else {})
