"""Transformers of Stable Diffusion 3 and 3.5 (Esser et al., arXiv:2403.03206)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from mlem_dist.models.families.family import Config, Family
from mlem_dist.solver.condition import POOLED, TEXT, Condition
from mlem_dist.solver.process import Process

TOKENS = 77 + 256
"""Number of tokens of a text: those of the CLIPs, and then those of T5."""


class SD3(Family):
    """`SD3Transformer2DModel`, conditioned on a text by two CLIPs and T5."""

    names = ("SD3Transformer2DModel",)
    patch = 2

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`. Without T5, the text has the CLIPs' tokens and width only: zeros stand for the rest."""
        text, width = condition[TEXT].to(x.dtype), model.config.joint_attention_dim
        text = pad(text, (0, width - text.shape[2], 0, TOKENS - text.shape[1]))
        pooled = condition[POOLED].to(x.dtype)
        return model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]

    def refusal(self, config: Config, process: Process) -> str:
        """As `Family.refusal`."""
        given, made = config["in_channels"], config.get("out_channels") or config["in_channels"]
        if given != made:
            return (
                f"its model takes {given} channels and predicts {made}, as models for inpainting or editing do; take a "
                "model that makes images from text alone"
            )
        if (patch := config.get("patch_size", self.patch)) != self.patch:
            return f"patch_size of its model is {patch}, expected {self.patch}; take a model of Stable Diffusion 3"
        return ""

    def inputs(self, config: Config) -> dict[str, tuple[int | None, ...]]:
        """As `Family.inputs`."""
        return {
            TEXT: (TOKENS, int(config["joint_attention_dim"])),
            POOLED: (int(config["pooled_projection_dim"]),),
        }
