"""Transformers of Chroma (https://huggingface.co/lodestones/Chroma1-HD), made from FLUX.1 [schnell]."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from mlem_dist.models.families.family import Config
from mlem_dist.models.families.flux import TOKENS, Flux
from mlem_dist.solver.condition import MASK, TEXT, Condition


class Chroma(Flux):
    """`ChromaTransformer2DModel`, conditioned on a text by T5 with a mask."""

    names = ("ChromaTransformer2DModel",)
    guided = True
    # The model makes a tensor on the CPU.
    recorded = False

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`. The mask goes on over the tokens of x, and diffusers adds it to scores of attention."""
        mask = pad(condition[MASK].to(x.dtype), (0, x.shape[2] * x.shape[3] // self.patch**2), value=1)
        return self.predict_tokens(model, x, t, condition[TEXT], attention_mask=mask)

    def inputs(self, config: Config) -> dict[str, tuple[int | None, ...]]:
        """As `Family.inputs`."""
        return {TEXT: (TOKENS, int(config["joint_attention_dim"])), MASK: (TOKENS,)}
