"""Files that survive a crash: written beside, synced, renamed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import google_crc32c
import numpy as np

from sae.errors import StoreError

PARTIAL = ".partial"
"""Suffix of a file that is being written; whatever carries it after a crash is litter."""

T = TypeVar("T")

_THREADS = 2


def crc32c(data: bytes | np.ndarray, start: int = 0) -> int:
    """Return the CRC-32C of bytes or of a C-contiguous array's memory, continuing from `start`."""
    block = data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    return int(google_crc32c.extend(start, block))


def write_all(fd: int, buffers: Sequence[bytes | np.ndarray]) -> int:
    """Write all buffers, however short the single system calls fall; return the bytes written."""
    views = [(memoryview(b) if isinstance(b, bytes) else b.data).cast("B") for b in buffers if len(b)]
    total = sum(len(v) for v in views)
    while views:
        done = os.writev(fd, views[:512])
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]
    return total


@contextmanager
def partial_file(path: Path) -> Iterator[int]:
    """Open a file beside `path`; on success sync it and give it its name, otherwise remove it.

    The caller syncs the folder (`sync_folder`) before it relies on the name.

    Raises
    ------
    StoreError
        The disk is full.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"no space left to write {path}",
                got=os.strerror(error.errno),
                do="free some space and start again; every committed row is kept",
            ) from error
        raise


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(a: Path, b: Path) -> None:
    """Let two folders of one file system change names, durably, in one step where the system can.

    Elsewhere `a` is out of the way as `NAME.exchanged` for a moment, and without a name if it crashes then.
    """
    at_cwd, swap = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), swap):
        aside = a.with_name(a.name + ".exchanged")
        a.replace(aside)
        b.replace(a)
        aside.replace(b)
    sync_folder(a.parent)


def run_all(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks in threads and return their results in order; none still runs when this returns or raises."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="assay-write") as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
