"""CUDA graphs: a small level's kernels take less time than their launches, and a graph launches them all at once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

Arguments = tuple[Tensor, Tensor, Tensor]


def as_run(level: nn.Module, device: str) -> nn.Module:
    """A level in evaluation mode as it is run, for inference, on "cpu" or "cuda"."""
    return Graphed(level) if device == "cuda" else level


class Graphed(nn.Module):
    """A level on a GPU, recorded as a CUDA graph at the first batch of each size; for one thread's inference.

    Takes x, t and label as every level does, and returns what it does.
    """

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.level = level
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Arguments, Tensor]] = {}

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The level's output for x (B, C, H, W) float32 at timesteps t (B,) int64 with classes label (B,) int64."""
        if x.shape not in self._graphs:
            self._graphs[x.shape] = self._record(x, t, label)
        graph, inputs, output = self._graphs[x.shape]
        for recorded, given in zip(inputs, (x, t, label), strict=True):
            recorded.copy_(given)
        graph.replay()
        # The next replay, of this graph or of another, writes to the same memory.
        return output.clone()

    def _record(self, *given: Tensor) -> tuple[torch.cuda.CUDAGraph, Arguments, Tensor]:
        x, t, label = (one.clone() for one in given)
        # What libraries set up at their first calls must not be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.level(x, t, label)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_first().pool(), capture_error_mode="thread_local"):
            output: Tensor = self.level(x, t, label)
        return graph, (x, t, label), output


@lru_cache(maxsize=1)
def _first() -> torch.cuda.CUDAGraph:
    """A graph in whose memory all graphs of a process compute in turn; kept, as the memory would go with it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
    return graph
