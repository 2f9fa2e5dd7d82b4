"""Where the memory goes that a step frees."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# names of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
_AT_LAST = {_M_MMAP_MAX: 1 << 16, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}
"""Where glibc's own adjustment of its settings ends, which cannot be switched on again."""
_SHARE = 1 / 32
"""Of the memory there is for a process, the parameters whose gradients are kept at most."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@contextmanager
def kept_memory(parameters: int) -> Iterator[None]:
    """Let freed memory stay with the process for the next step, and give it back at the end.

    glibc takes large blocks, of 32 MiB or more at the latest, from the system and gives them back when they are freed.
    The gradients of a large dictionary are such blocks, and at every step the system would hand them out again page by
    page, zeroed: a tenth of a step of 16,384 features of 512. Kept, a block may lie in the heap several times before
    one fits another (seven times, where nothing else is asked for), so those of dictionaries that are large beside the
    memory go back as ever. An allocator without these settings is left alone.

    Parameters
    ----------
    parameters
        Bytes of the parameters on the CPU, of which there are gradients at every step.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or parameters > _SHARE * _memory():
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        for name, value in _AT_LAST.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)


def give_back() -> None:
    """Give what is free now back to the system, though it is kept: for after work that no step repeats."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _memory() -> float:
    """Return the bytes that this process may take of the machine, or of its container, as one of the ranks there."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [
        int(text)
        for path in map(Path, _LIMITS)
        if path.exists() and (text := path.read_text().strip()).isdigit()
    ]
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
