"""UNets of Stable Diffusion 1 and 2 and of Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem_dist.models.families.family import Config, Family
from mlem_dist.solver.condition import POOLED, SIZES, TEXT, Condition
from mlem_dist.solver.process import Process

FURTHER = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Keys of further conditions, which are null for a model that has none."""


class ConditionalUNet(Family):
    """`UNet2DConditionModel`, conditioned on a text and, if it is one of Stable Diffusion XL, on sizes."""

    names = ("UNet2DConditionModel",)

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`."""
        added = None
        if POOLED in condition:
            added = {"text_embeds": condition[POOLED].to(x.dtype), "time_ids": condition[SIZES].to(x.dtype)}
        text = condition[TEXT].to(x.dtype)
        out = model(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)
        return out[0]

    def refusal(self, config: Config, process: Process) -> str:
        """As `Family.refusal`."""
        given, made = config["in_channels"], config["out_channels"]
        if given != made:
            return (
                f"its model takes {given} channels and predicts {made}, as models for inpainting, depth or editing do; "
                "take a model that makes images from text alone"
            )
        if config.get("time_cond_proj_dim"):
            return (
                f"time_cond_proj_dim of its model is {config['time_cond_proj_dim']}, expected null: consistency models "
                "(LCM) predict the image at the end, and no drift; take the model from which it was distilled"
            )
        for key in FURTHER:
            if config.get(key) is not None:
                return (
                    f"{key} of its model is {config[key]!r}, expected null: it needs more than a prompt; take a model "
                    "that makes images from text alone"
                )
        if (kind := config.get("addition_embed_type")) not in (None, "text_time"):
            return (
                f"addition_embed_type of its model is {kind!r}, expected null or 'text_time'; take a model of Stable "
                "Diffusion or Stable Diffusion XL"
            )
        return ""

    def inputs(self, config: Config) -> dict[str, tuple[int | None, ...]]:
        """As `Family.inputs`."""
        width = config["cross_attention_dim"]
        shapes: dict[str, tuple[int | None, ...]] = {TEXT: (None, int(width if isinstance(width, int) else width[0]))}
        if config.get("addition_embed_type") == "text_time":
            # The model embeds each of the six sizes.
            sizes = 6 * int(config["addition_time_embed_dim"])
            shapes |= {POOLED: (int(config["projection_class_embeddings_input_dim"]) - sizes,), SIZES: (6,)}
        return shapes
