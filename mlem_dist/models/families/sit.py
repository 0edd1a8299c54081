"""Transformers of SiT, flows of classes (Ma et al., arXiv:2401.08740)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlem_dist.models.families.dit import DiT
from mlem_dist.models.families.family import Config
from mlem_dist.solver.condition import Condition
from mlem_dist.solver.process import FlowProcess, Process

LENGTH = 1000
"""Number of training timesteps of the scheduler of a SiT: the time of pure noise."""


class SiT(DiT):
    """`SiTTransformer2DModel`, whose own time goes from 0, pure noise, to 1, the image."""

    names = ("SiTTransformer2DModel",)

    def model_class(self) -> Any:
        """As `Family.model_class`."""
        from mlem_dist.models.sit import SiTTransformer2DModel

        return SiTTransformer2DModel

    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Family.predict`: the velocity from the image to the noise, which is that of the model turned round."""
        return -super().predict(model, x, 1 - t / LENGTH, condition)

    def refusal(self, config: Config, process: Process) -> str:
        """As `Family.refusal`."""
        if not isinstance(process, FlowProcess) or process.length != LENGTH:
            return (
                f"its model is a flow of {LENGTH} timesteps, and the noise schedule of its pipeline is none; take the "
                f"scheduler FlowMatchEulerDiscreteScheduler with num_train_timesteps {LENGTH}"
            )
        return super().refusal(config, process)
