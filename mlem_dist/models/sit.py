"""The transformer of SiT (Ma et al., arXiv:2401.08740) as a model of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

Constructor = Callable[..., None]

same_keys: Callable[[Constructor], Constructor] = wraps(DiTTransformer2DModel.__init__)
"""Decorator of a constructor that takes the configuration of DiT: diffusers reads the keys from its signature."""


class SiTTransformer2DModel(DiTTransformer2DModel):
    """The transformer of DiT with SiT's embedding of times: the frequencies 10000^(-k/128) for k = 0 ... 127.

    Those of diffusers' DiT are 10000^(-k/127). The rest is the same, with weights under other names.
    """

    transformer_blocks: Any

    @same_keys
    def __init__(self, *values: Any, **config: Any) -> None:
        super().__init__(*values, **config)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
