"""CUDA graphs: a small level's kernels take less time than their launches, and a graph launches them all at once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn


def as_run(level: nn.Module, device: str) -> nn.Module:
    """A level in evaluation mode as it is run, for inference, on "cpu" or "cuda"."""
    return Graphed(level) if device == "cuda" else level


class Graphed(nn.Module):
    """A level on a GPU, recorded as a CUDA graph at the first batch of each size; for one thread's inference.

    Takes what every level takes, and returns what it returns.
    """

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.level = level
        self._graphs: dict[tuple[torch.Size, int], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def forward(self, *given: Tensor) -> Tensor:
        """As the level's; where the base is not known, it is not given at all."""
        key = given[0].shape, len(given)
        if key not in self._graphs:
            self._graphs[key] = self._record(*given)
        graph, inputs, output = self._graphs[key]
        for recorded, new in zip(inputs, given, strict=True):
            recorded.copy_(new)
        graph.replay()
        # The next replay, of this graph or of another, writes to the same memory.
        return output.clone()

    def _record(self, *given: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        inputs = [tensor.clone() for tensor in given]
        # What libraries set up at their first calls must not be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.level(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_first().pool(), capture_error_mode="thread_local"):
            output: Tensor = self.level(*inputs)
        return graph, inputs, output


@lru_cache(maxsize=1)
def _first() -> torch.cuda.CUDAGraph:
    """A graph in whose memory all graphs of a process compute in turn; kept, as the memory would go with it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
    return graph
