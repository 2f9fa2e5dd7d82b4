"""Threads that write files: a few copy rows at a time, the others wait for the disk.

So processor and disk work at once, and syncs that wait together are one sync to the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Lock
from types import TracebackType
from typing import NamedTuple

import numpy as np

_THREADS = 8
_COPYING = 2


class Scratch:
    """Memory that is used again and again, by use."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an array with any content; the one given for the same use before is no longer valid."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if use not in self._memory or self._memory[use].nbytes < size:
            self._memory[use] = np.empty(size, np.uint8)
        return self._memory[use][:size].view(dtype).reshape(shape)


class Copying(NamedTuple):
    """What rows are copied with: memory, and who sees the rows piece by piece, padding left out, in order."""

    scratch: Scratch
    visit: Callable[[np.ndarray], None] = lambda _: None


class FileThreads:
    """Threads that write files, and what those of them that copy copy through."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="assay-write")
        self._free: SimpleQueue[Scratch] = SimpleQueue()
        for _ in range(_COPYING):
            self._free.put(Scratch())

    @contextmanager
    def copying(self) -> Iterator[Scratch]:
        """Wait for a turn to copy; gives memory for it."""
        scratch = self._free.get()
        try:
            yield scratch
        finally:
            self._free.put(scratch)

    def close(self) -> None:
        """Wait until every file is written."""
        self.pool.shutdown()

    def __enter__(self) -> FileThreads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Turns:
    """Counts the files that hold the same rows, and says when all of them are copied.

    Parameters
    ----------
    threads
        Who copies.
    files
        How many files.
    done
        Called after the last.
    """

    def __init__(self, threads: FileThreads, files: int, done: Callable[[], None]) -> None:
        self._threads, self._left, self._done, self._lock = threads, files, done, Lock()

    @contextmanager
    def turn(self) -> Iterator[Scratch]:
        """Copy one of the files."""
        with self._threads.copying() as scratch:
            yield scratch
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._done()
