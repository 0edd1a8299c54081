"""Levels as combinations of conditional and unconditional evaluations of models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlem_dist.solver.condition import Condition, negative, positive
from mlem_dist.solver.integrate import Known
from mlem_dist.solver.process import Process

GUIDANCE = "guidance"
"""Name of the tensor of guidance scales, float32 (B,), in the condition of samples with scales of their own."""


class Evaluation(nn.Module):
    """The conditional or unconditional value of a model's drift, which levels at one state and time share.

    Args:
        level: the model's drift.
        name: the model's name.
        unconditional: whether negative tensors take the place of those of the condition.
    """

    def __init__(self, level: nn.Module, name: str, unconditional: bool) -> None:
        super().__init__()
        self.level = level
        self.key = name, unconditional

    def forward(self, x: Tensor, t: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
        """Drift for x (B, C, H, W) float32 at times t (B,); from `known`, or noted there."""
        known = {} if known is None else known
        if self.key not in known:
            _, unconditional = self.key
            known[self.key] = self.level(x, t, negative(condition) if unconditional else positive(condition))
        return known[self.key]


class ScaledLevel(nn.Module):
    """A drift with guidance whose model takes the scale as an input (Meng et al., arXiv:2210.03142).

    Args:
        level: the model's drift.
        scale: the scale, for samples whose condition has none.
    """

    def __init__(self, level: nn.Module, scale: float) -> None:
        super().__init__()
        self.level, self.scale = level, scale

    def forward(self, x: Tensor, t: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
        """Drift for x (B, C, H, W) float32 at times t (B,)."""
        value: Tensor = self.level(x, t, {GUIDANCE: torch.full_like(t, self.scale), **positive(condition)}, known)
        return value


class GuidedLevel(nn.Module):
    """A drift with guidance, f + (w - 1) (c - u) (Ho & Salimans, arXiv:2207.12598).

    f is the model's conditional drift. c and u are the conditional and unconditional drifts of the model that gives the
    direction: the same model, or a smaller one. Outside of the interval, the level is f.

    Args:
        value: f.
        conditional: c.
        unconditional: u.
        scale: w, for samples whose condition has no scale.
        interval: the part of the noise schedule in which the level is guided: 0 is pure noise, and 1 is the image.
        process: the ladder's process.
        varies: whether a scale in a sample's condition takes the place of w.
    """

    def __init__(
        self,
        value: Evaluation,
        conditional: Evaluation,
        unconditional: Evaluation,
        scale: float,
        interval: tuple[float, float],
        process: Process,
        varies: bool = True,
    ) -> None:
        super().__init__()
        self.value, self.conditional, self.unconditional = value, conditional, unconditional
        self.scale, self.interval, self.process, self.varies = scale, interval, process, varies

    def forward(self, x: Tensor, t: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
        """Drift for x (B, C, H, W) float32 at times t (B,)."""
        known = {} if known is None else known
        value = self.value(x, t, condition, known)
        own = self.varies and GUIDANCE in condition
        scale = condition[GUIDANCE] if own else torch.full_like(t, self.scale)
        weight = torch.where(self._inside(t), scale - 1, 0.0)
        if not weight.any():
            return value
        conditional = self.conditional(x, t, condition, known)
        direction = conditional - self.unconditional(x, t, condition, known)
        return torch.addcmul(value, weight[:, None, None, None], direction)

    def _inside(self, t: Tensor) -> Tensor:
        """Whether times t (B,) are in the interval, bool (B,)."""
        start, stop = self.interval
        if (start, stop) == (0.0, 1.0):
            return torch.ones_like(t, dtype=torch.bool)
        elapsed = 1 - t / self.process.length
        return (elapsed >= start) & (elapsed < stop)
