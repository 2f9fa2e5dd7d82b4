"""Files that survive a crash: written beside, synced, renamed; checksummed records; a lock on a folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from sae.errors import StoreError

PARTIAL = ".partial"
"""Suffix of a file that is being written; whatever carries it after a crash is litter."""

T = TypeVar("T")

_THREADS = 2


class LockedError(StoreError):
    """Another process, or another object of this one, holds a lock."""


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


def write_file(path: Path, data: bytes) -> None:
    """Replace a whole small file durably: afterwards the old or the new content is there, never a part."""
    with partial_file(path) as fd:
        write_all(fd, [data])
    sync_folder(path.parent)


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


def write_record(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON record with the checksum of its body, durably."""
    write_file(path, json.dumps({"crc32c": record_crc(body), "body": body}, sort_keys=True).encode())


def record_crc(body: dict[str, Any]) -> int:
    """Return the checksum of a record's canonical text."""
    return crc32c(json.dumps(body, sort_keys=True).encode())


def read_record(path: Path) -> dict[str, Any]:
    """Read a record that `write_record` wrote.

    Raises
    ------
    StoreError
        The file is missing, is not such a record, or its checksum does not match.
    """
    try:
        outer = json.loads(path.read_bytes())
        body, crc = outer["body"], outer["crc32c"]
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged: it is not a record", got=f"{path.stat().st_size} bytes"
        ) from error
    if not isinstance(body, dict) or record_crc(body) != crc:
        raise StoreError(f"{path} is damaged: its checksum does not match")
    return body


def file_crc(path: Path) -> tuple[int, int]:
    """Return size and checksum of a small file.

    Raises
    ------
    StoreError
        It is missing.
    """
    data = read_bytes(path)
    return len(data), crc32c(data)


def read_bytes(path: Path) -> bytes:
    """Read a small file; StoreError if it is missing."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing") from error


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


class FileLock:
    """An exclusive lock on a file, released when the process ends however it ends.

    Parameters
    ----------
    path
        The file; created if absent, never removed.
    wait
        Whether to wait for another holder instead of failing.

    Raises
    ------
    LockedError
        Another process, or another object of this one, holds it.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            holder = os.pread(self._fd, 100, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise LockedError(
                f"{path.parent} is being written by another process",
                got=f"locked by process {holder or 'unknown'}",
                do="wait for it to end, or stop it",
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    @property
    def released(self) -> bool:
        """Whether it is no longer held."""
        return self._fd < 0

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
