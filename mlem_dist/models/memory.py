"""Settings for the return of memory from the C library to the kernel."""

from __future__ import annotations

import ctypes

# From malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """Keep the memory of freed tensors in this process for later tensors; do nothing if the C library is not glibc.

    Otherwise every large CPU tensor is new memory from the kernel, which clears it page by page. That takes a tenth of
    a level's time. Call this function before threads start, as they would get their own heaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions of glibc refuse more than 32 MiB. Without this threshold, the other settings would cost time.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)
