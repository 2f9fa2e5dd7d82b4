"""Where the memory goes that a step frees."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# names and defaults of <malloc.h>
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 128 << 10
_M_MMAP_MAX, _MMAP_MAX = -4, 1 << 16
_NEVER = 2**31 - 1


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let freed memory stay with the process for the next step, and give it back at the end.

    glibc takes every block of 32 MiB or more from the system and gives it back when it is freed. The gradients of a
    large dictionary are such blocks, and at every step the system would hand them out again page by page, zeroed: a
    tenth of a step of 16,384 features of 512. An allocator without these settings is left alone.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        libc.malloc_trim(0)
