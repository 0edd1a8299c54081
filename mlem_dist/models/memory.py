"""How the C library gives memory back."""

from __future__ import annotations

import ctypes

# From malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """Let this process keep the memory that tensors free, for the next ones; nothing where the C library is not glibc.

    Otherwise every large tensor of a CPU is new memory from the kernel, which clears it page by page: a tenth of a
    level's time. Call it before threads start, which would get heaps of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # An older glibc refuses more than 32 MiB; without any threshold the rest would make it worse.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)
