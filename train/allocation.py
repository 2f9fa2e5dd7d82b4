"""Where the memory goes that a step frees."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# names and defaults of <malloc.h>
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 128 << 10
_M_MMAP_MAX, _MMAP_MAX = -4, 1 << 16
_NEVER = 2**31 - 1
_SHARE = 1 / 64
"""Of the machine's memory, the largest block to be kept."""


@contextmanager
def kept_memory(largest: int) -> Iterator[None]:
    """Let freed memory stay with the process for the next step, and give it back at the end.

    glibc takes every block of 32 MiB or more from the system and gives it back when it is freed. The gradients of a
    large dictionary are such blocks, and at every step the system would hand them out again page by page, zeroed: a
    tenth of a step of 16,384 features of 512. Kept, they may lie several times in the heap before one fits another
    (seven times, where nothing else is asked for), so blocks that are large beside the machine's memory go back as
    ever. An allocator without these settings is left alone.

    Parameters
    ----------
    largest
        Bytes of the largest block that is asked for again and again.
    """
    libc = ctypes.CDLL(None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not hasattr(libc, "mallopt") or largest > _SHARE * memory:
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
