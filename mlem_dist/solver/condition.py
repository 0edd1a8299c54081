"""Conditions: what the samples of a batch are conditioned on, as tensors with the batch first."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LABEL = "label"
"""Name of the tensor of classes, int64 (B,), in the condition of a class-conditional ladder."""

TEXT, POOLED, SIZES = "text", "pooled", "sizes"
"""Names of tensors in the condition of a ladder with prompts: embeddings of the prompt's tokens (B, tokens, width), of
the whole prompt (B, width), and original height and width, crop at the top and left, target height and width in pixels
(B, 6)."""

MASK, RESOLUTION = "mask", "resolution"
"""Names of further tensors of a ladder with prompts: 1 for each token of the prompt and 0 for padding (B, tokens), and
the image's height and width in pixels and their ratio (B, 3)."""

NEGATIVE = "negative_"
"""Prefix of the name of a tensor that takes another one's place in unconditional evaluations, by guided levels."""

Condition = Mapping[str, Tensor]
"""Tensors (B, ...) by name; empty for unconditional samples."""


def take(condition: Condition, rows: slice | Tensor) -> Condition:
    """The condition of some of a batch's samples."""
    return {name: value[rows] for name, value in condition.items()}


def join(conditions: Sequence[Condition]) -> Condition:
    """The condition of several batches, one after the other; all have the same names."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def move(condition: Condition, device: torch.device | str) -> Condition:
    """The condition on a device."""
    return {name: value.to(device) for name, value in condition.items()}


def positive(condition: Condition) -> Condition:
    """The condition without its negative tensors."""
    return {name: value for name, value in condition.items() if not name.startswith(NEGATIVE)}


def negative(condition: Condition) -> Condition:
    """The condition of unconditional evaluations: each tensor that has a negative one is replaced by it."""
    return {name: condition.get(NEGATIVE + name, value) for name, value in positive(condition).items()}
