"""Devices and threads of this process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mlem_dist.machine import memory_per_core


def default_device() -> str:
    """The device type on this machine: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_memory(device: str) -> float:
    """Bytes of memory of this machine's smallest GPU, or for each of its CPU cores; infinite for "cuda" without one."""
    if device == "cpu":
        return memory_per_core()
    return min(map(gpu_memory, range(torch.cuda.device_count())), default=math.inf)


def gpu_memory(index: int = 0) -> float:
    """Bytes of memory of a GPU of this machine."""
    return float(torch.cuda.get_device_properties(index).total_memory)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run each operation of torch on one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
