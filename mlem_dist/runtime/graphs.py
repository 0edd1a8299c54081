"""CUDA graphs: a small UNet's kernels take less time than their launches, and a graph launches them all at once.

Not run on a GPU yet; tests/runtime/test_graphs.py is to be run there first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Graphed(nn.Module):
    """A diffusers UNet on a GPU, recorded as a CUDA graph at the first batch of each shape; for one thread's inference.

    Takes the arguments that `UNetLevel` gives its model, and returns what the model does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor | None], Tensor]] = {}

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
        """The model's output, a 1-tuple, for x (B, C, H, W) of its dtype, t (B,) int64, classes (B,) int64 or None."""
        if x.shape not in self._graphs:
            self._graphs[x.shape] = self._record(x, t, class_labels)
        graph, inputs, output = self._graphs[x.shape]
        for recorded, given in zip(inputs, (x, t, class_labels), strict=True):
            if recorded is not None and given is not None:
                recorded.copy_(given)
        graph.replay()
        # The next replay writes to the same memory.
        return (output.clone(),)

    def _record(
        self, x: Tensor, t: Tensor, label: Tensor | None
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor | None], Tensor]:
        inputs = x.clone(), t.clone(), None if label is None else label.clone()

        def run() -> Tensor:
            out: Tensor = self.model(inputs[0], inputs[1], class_labels=inputs[2], return_dict=False)[0]
            return out

        # What libraries set up at their first calls must not be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = run()
        return graph, inputs, output
