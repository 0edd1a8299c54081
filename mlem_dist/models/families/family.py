"""The interface of a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mlem_dist.solver.condition import LABEL, Condition
from mlem_dist.solver.process import Process, process_of

Config = Mapping[str, Any]
"""The configuration of a model, as in its config.json."""


class Family(ABC):
    """How the models of one class of diffusers are called, and what they need.

    Attributes:
        names: names of the class: the first is the class itself, others stand for it in configurations.
        patch: height and width of what is a token of the model, of which those of samples are multiples; 0 if there are
            none, or if their number does not matter.
        even: whether the pipeline itself lays out the noise levels of a flow, evenly, instead of its scheduler.
        guided: whether guidance may combine evaluations with and without the condition.
        recorded: whether CUDA graphs can record evaluations, which then make all tensors on the device of x.
    """

    names: ClassVar[tuple[str, ...]]
    patch: ClassVar[int] = 0
    even: ClassVar[bool] = False
    guided: ClassVar[bool] = True
    recorded: ClassVar[bool] = True

    def model_class(self) -> Any:
        """The class of the models; imports diffusers."""
        import diffusers

        return getattr(diffusers, self.names[0])

    @abstractmethod
    def predict(self, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The model's prediction in the shape of x (B, C, H, W), at the times t (B,) that the scheduler gives it."""

    def process(self, scheduler: Config, shape: tuple[int, int, int]) -> Process:
        """The process of a scheduler's configuration for samples of a shape (C, H, W), with the pipeline's grids.

        Raises:
            UsageError: as for `process_of`.
        """
        tokens = shape[1] * shape[2] // self.patch**2 if self.patch else None
        return process_of(scheduler, tokens, self.even)

    def refusal(self, config: Config, process: Process) -> str:
        """The reason why a model cannot be used with a process, as a sentence about "its model"; "" if it can."""
        return ""

    def channels(self, config: Config) -> int:
        """Number of channels of a sample."""
        return int(config["in_channels"])

    def size(self, config: Config) -> tuple[int, int] | None:
        """Height and width of the samples that the model was trained for; None if its configuration does not say."""
        size = config.get("sample_size")
        if isinstance(size, int):
            return size, size
        return (int(size[0]), int(size[1])) if size else None

    def inputs(self, config: Config) -> dict[str, tuple[int | None, ...]]:
        """The tensors of the condition that the model takes, by name, with their shapes without the batch.

        None stands for any length, such as a number of tokens.
        """
        return {LABEL: ()} if self.classes(config) else {}

    def scale(self, config: Config) -> float | None:
        """The pipeline's default of the guidance scale that is an input of the model; None if the model takes none."""
        return None

    def classes(self, config: Config) -> int:
        """Number of classes that the model is conditioned on; 0 for none."""
        return 0

    def fits(self, config: Config, classes: int) -> bool:
        """Whether the model fits a ladder of so many classes, 0 for none."""
        return self.classes(config) == classes

    def has_null(self, config: Config, classes: int) -> bool:
        """Whether the model of a ladder of `classes` takes the class after the last for none, as guidance needs."""
        return False
