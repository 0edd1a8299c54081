"""Diffusion transformers of classes (Peebles & Xie, arXiv:2212.09748)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mlem_dist.models.families.family import Config, Family
from mlem_dist.solver.condition import LABEL, Condition
from mlem_dist.solver.process import Process


class DiT(Family):
    """`DiTTransformer2DModel`, whose configurations may name the class `Transformer2DModel` of which it was a part."""

    names: ClassVar[tuple[str, ...]] = ("DiTTransformer2DModel", "Transformer2DModel")

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`, without the learned variance, which has the second half of the output's channels."""
        out = model(x, timestep=t, class_labels=condition[LABEL], return_dict=False)[0]
        return out[:, : x.shape[1]]

    def refusal(self, config: Config, process: Process) -> str:
        """As `Family.refusal`."""
        if (kind := config.get("norm_type")) not in (None, "ada_norm_zero"):
            return f"norm_type of its model is {kind!r}, expected 'ada_norm_zero'; take a model of DiT"
        return ""

    def classes(self, config: Config) -> int:
        """As `Family.classes`."""
        return int(config.get("num_embeds_ada_norm") or 1000)

    def has_null(self, config: Config, classes: int) -> bool:
        """As `Family.has_null`."""
        return True
