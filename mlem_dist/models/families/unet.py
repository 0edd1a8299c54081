"""Unconditional and class-conditional UNets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem_dist.models.families.family import Config, Family
from mlem_dist.solver.condition import LABEL, Condition
from mlem_dist.solver.process import Process


class UNet(Family):
    """`UNet2DModel`, with or without classes."""

    names = ("UNet2DModel", "unet")

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`."""
        config = model.config
        times = t.long() if config.time_embedding_type == "learned" else t
        label = condition[LABEL] if config.num_class_embeds is not None else None
        return model(x, times, class_labels=label, return_dict=False)[0]

    def refusal(self, config: Config, process: Process) -> str:
        """As `Family.refusal`: a model may need a time of the process and a class, but nothing else."""
        classes = config.get("num_class_embeds")
        if (kind := config.get("class_embed_type")) not in (None, "timestep" if classes else None):
            return (
                f"class_embed_type of its model is {kind!r}, expected null: a ladder gives a model the timestep and "
                f"{'the number of a class' if classes else 'no class'}; take a model that needs nothing else"
            )
        kind = config.get("time_embedding_type")
        if (kind == "fourier") != (process.prediction == "score"):
            expected = "fourier" if process.prediction == "score" else "positional"
            return (
                f"time_embedding_type of its model is {kind!r}, expected {expected} by the ladder's noise schedule; "
                "take a model that was trained on that"
            )
        known = config.get("num_train_timesteps")
        if kind == "learned" and not (isinstance(known, int) and known >= process.length):
            return (
                f"num_train_timesteps of its model is {known}, expected at least the {process.length} of the noise "
                "schedule; take that with which the model was trained"
            )
        return ""

    def classes(self, config: Config) -> int:
        """As `Family.classes`."""
        return int(config.get("num_class_embeds") or 0)

    def fits(self, config: Config, classes: int) -> bool:
        """As `Family.fits`; one more class than the ladder has may stand for none."""
        return self.classes(config) == classes or self.has_null(config, classes)

    def has_null(self, config: Config, classes: int) -> bool:
        """As `Family.has_null`."""
        return classes > 0 and self.classes(config) == classes + 1
