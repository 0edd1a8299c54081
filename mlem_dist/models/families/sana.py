"""Transformers of SANA (Xie et al., arXiv:2410.10629)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem_dist.models.families.family import Config, Family
from mlem_dist.solver.condition import MASK, TEXT, Condition
from mlem_dist.solver.process import Process


class Sana(Family):
    """`SanaTransformer2DModel`, conditioned on a text."""

    names = ("SanaTransformer2DModel",)

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`."""
        out = model(
            x,
            encoder_hidden_states=condition[TEXT].to(x.dtype),
            encoder_attention_mask=condition[MASK],
            timestep=t * model.config.timestep_scale,
            return_dict=False,
        )
        return out[0]

    def refusal(self, config: Config, process: Process) -> str:
        """As `Family.refusal`."""
        if config.get("guidance_embeds"):
            return (
                "guidance_embeds of its model is true, expected false: SANA-Sprint is distilled to a few steps of "
                "another parametrisation; take the model of a SanaPipeline"
            )
        return ""

    def inputs(self, config: Config) -> dict[str, tuple[int | None, ...]]:
        """As `Family.inputs`."""
        return {TEXT: (None, int(config["caption_channels"])), MASK: (None,)}
