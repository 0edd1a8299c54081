"""CUDA graphs, which launch all kernels of a level at once: launches take longer than the kernels of a small level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mlem_dist.models.guidance import Evaluation
from mlem_dist.models.level import ModelLevel
from mlem_dist.solver.condition import Condition
from mlem_dist.solver.integrate import Known


def as_run(level: nn.Module, device: str) -> nn.Module:
    """The module that runs a level in evaluation mode: on "cpu" the level itself, on "cuda" one with CUDA graphs.

    Evaluations that levels share are recorded one by one, except for those of families that cannot be recorded.
    """
    if device != "cuda":
        return level
    shared = [module for module in level.modules() if isinstance(module, Evaluation)]
    if not shared:
        return Graphed(level)
    for evaluation in shared:
        if not isinstance(evaluation.level, Graphed) and _recorded(evaluation.level):
            evaluation.level = Graphed(evaluation.level)
    return level


def _recorded(level: nn.Module) -> bool:
    return all(module.family.recorded for module in level.modules() if isinstance(module, ModelLevel))


class Graphed(nn.Module):
    """A level on a GPU, recorded as a CUDA graph at the first batch of each size, for inference by one thread.

    Arguments and return value are those of the level.
    """

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.level = level
        self.takes: tuple[int, ...] = getattr(level, "takes", ())
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def forward(self, x: Tensor, t: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
        """Drift for x (B, C, H, W) float32 at times t (B,), as of the level."""
        taken = {k: known[k] for k in self.takes if k in known} if known else {}
        names, numbers = sorted(condition), list(taken)
        given = [x, t, *(condition[name] for name in names), *taken.values()]
        key = (*(tensor.shape for tensor in given), *numbers)
        if key not in self._graphs:
            self._graphs[key] = self._record(given, names, numbers)
        graph, inputs, output = self._graphs[key]
        for recorded, new in zip(inputs, given, strict=True):
            recorded.copy_(new)
        graph.replay()
        # The next replay of this or another graph overwrites the memory of `output`.
        return output.clone()

    def _record(
        self, given: Sequence[Tensor], names: Sequence[str], numbers: Sequence[int]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """The graph, its inputs and its output, for x, t, the tensors `names` of the condition and levels `numbers`."""
        inputs = [tensor.clone() for tensor in given]
        x, t, *rest = inputs
        arguments = x, t, dict(zip(names, rest, strict=False)), dict(zip(numbers, rest[len(names) :], strict=True))
        # Warm up: initialisation of libraries in their first calls must not be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.level(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_first().pool(), capture_error_mode="thread_local"):
            output: Tensor = self.level(*arguments)
        return graph, inputs, output


@lru_cache(maxsize=1)
def _first() -> torch.cuda.CUDAGraph:
    """A graph whose memory pool all graphs of a process share, one replay at a time; the cache keeps the pool alive."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
    return graph
