"""Bytes of activations: what an evaluation holds beside weights, measured without weights, memory or a device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCHES = (2, 4)
"""Numbers of samples of two evaluations, whose difference is what a sample takes."""


def activation_bytes(run: Callable[[int], object]) -> int:
    """Bytes per sample by which the peak of `run` grows with the batch, whose size is its argument.

    Peaks are those of `peak_bytes`. What does not grow with the batch, such as weights in another dtype, is left out.
    """
    few, many = (peak_bytes(partial(run, batch)) for batch in BATCHES)
    return (many - few) // (BATCHES[1] - BATCHES[0])


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest number of bytes of tensors that are alive at a time during `run`, without gradients.

    Tensors that exist before, such as weights, do not count. The tensors may be on torch's meta device, where shapes
    alone are computed. Workspaces of libraries are not seen, nor the slack of allocators.
    """
    with torch.no_grad(), _Storages() as storages, _LeanAttention():
        run()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._note(value, made=False)
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self._note(value, made=True)
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, value: Any, made: bool) -> None:
        """Enter the storage of a tensor, unless it is known: views share one. One that was not `made` here is free."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes() if made else 0
            self.live += size
            self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class _LeanAttention(TorchFunctionMode):
    """Attention that holds its result alone, as kernels of CPUs and GPUs do.

    On the meta device, torch would compute the scores of all pairs of tokens.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attention(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """An empty result of attention, (..., L, E) for queries (..., L, D) and values (..., S, E)."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
