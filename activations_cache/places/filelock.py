"""A lock on a file, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import ClassVar

from .base import LockedError


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

    final: ClassVar[bool] = True

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

    def check(self) -> None:
        """Do nothing: nobody can take it over."""

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
