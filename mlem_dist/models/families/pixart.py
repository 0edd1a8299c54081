"""Transformers of PixArt-alpha (Chen et al., arXiv:2310.00426) and PixArt-Sigma (Chen et al., arXiv:2403.04692)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem_dist.models.families.family import Config, Family
from mlem_dist.solver.condition import MASK, RESOLUTION, TEXT, Condition


class PixArt(Family):
    """`PixArtTransformer2DModel`, conditioned on a text and, if it is of PixArt-alpha at 1024 pixels, on sizes."""

    names = ("PixArtTransformer2DModel",)

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`, without the learned variance, which has the second half of the output's channels."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if RESOLUTION in condition:
            size = condition[RESOLUTION].to(x.dtype)
            added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
        out = model(
            x,
            encoder_hidden_states=condition[TEXT].to(x.dtype),
            encoder_attention_mask=condition[MASK],
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return out[0][:, : x.shape[1]]

    def inputs(self, config: Config) -> dict[str, tuple[int | None, ...]]:
        """As `Family.inputs`."""
        width = config.get("caption_channels") or config["cross_attention_dim"]
        shapes: dict[str, tuple[int | None, ...]] = {TEXT: (None, int(width)), MASK: (None,)}
        sized = config.get("use_additional_conditions")
        # The default of diffusers.
        if config.get("sample_size", 128) == 128 if sized is None else sized:
            shapes[RESOLUTION] = (3,)
        return shapes
