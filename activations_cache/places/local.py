"""A folder of a disk: files are written beside, synced and renamed; locks end with the process."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from activations_cache.durable import PARTIAL, partial_file, sync_folder, write_all
from sae.errors import StoreError

from .base import NewFile, Place, TakenError, too_short
from .filelock import FileLock
from .pieces import Pieces, read_pieces

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class LocalPlace(Place):
    """A file or folder of this machine; it goes wherever a path goes."""

    path: Path

    threads: ClassVar[int] = 2
    poll_seconds: ClassVar[float] = 0.2
    remembers: ClassVar[bool] = True

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.path.name

    @property
    def address(self) -> str:
        """The absolute path."""
        return str(self.path.expanduser().absolute())

    @property
    def parent(self) -> LocalPlace:
        """The folder that it is in."""
        return LocalPlace(self.path.parent)

    def __truediv__(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name)

    def read(self) -> bytes:
        """Return the whole content; StoreError if there is none."""
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{self} is missing") from error

    def scatter(self, pieces: Pieces, offset: int) -> None:
        """Fill pieces of memory from `offset` on."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise StoreError(f"{self} is missing") from error
        try:
            missing = read_pieces(fd, pieces, offset)
        finally:
            os.close(fd)
        if missing:
            raise too_short(self, missing, offset + int(pieces[:, 1].sum()) - missing)

    def expect(self, offset: int, size: int) -> None:
        """Let the kernel fetch some bytes into memory, where it takes such advice."""
        if not hasattr(os, "posix_fadvise"):
            return
        # whatever is wrong, the read says so
        with suppress(OSError):
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def write(self, data: bytes) -> None:
        """Replace the whole content, durably."""
        folders = self.parent.make()
        with self.new_file() as file:
            file.write([data])
        for folder in folders:
            folder.sync()

    def create(self, data: bytes) -> None:
        """Write the content, durably, if there is none."""
        folders = self.parent.make()
        beside = self.path.with_name(f"{self.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            if self.path.exists():
                # nothing is written beside a record that is there: `seal` may be sweeping
                raise FileExistsError(self.path)
            with partial_file(beside) as fd:
                write_all(fd, [data])
            _link(beside, self.path)
        except FileExistsError as error:
            if self.read() != data:
                raise TakenError(f"{self} is there already, with other content") from error
        finally:
            beside.unlink(missing_ok=True)
        for folder in folders:
            folder.sync()

    @contextmanager
    def new_file(self) -> Iterator[NewFile]:
        """Write piece by piece; the content appears at the end."""
        self._make_parent()
        with partial_file(self.path) as fd:
            yield _Descriptor(fd)

    def make(self) -> set[LocalPlace]:
        """Make this folder if need be; return it, and those above it that have a new name in them."""
        new = [self.path]
        while not new[-1].is_dir():
            new.append(new[-1].parent)
        self.path.mkdir(parents=True, exist_ok=True)
        return {LocalPlace(path) for path in new}

    def sync(self) -> None:
        """Make the names of the files in this folder durable."""
        sync_folder(self.path)

    def remove(self) -> None:
        """Remove one file, if it is there."""
        self.path.unlink(missing_ok=True)

    def size(self) -> int | None:
        """Return the bytes of a file; None if there is none."""
        return self.path.stat().st_size if self.path.is_file() else None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file in this folder, however deep."""
        found: dict[str, int] = {}
        queue = [("", str(self.path))] if self.path.is_dir() else []
        while queue:
            prefix, folder = queue.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        queue.append((f"{prefix}{entry.name}/", entry.path))
                    else:
                        found[prefix + entry.name] = entry.stat().st_size
        return found

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one, sorted."""
        return sorted(p.name for p in self.path.iterdir() if p.is_dir()) if self.path.is_dir() else []

    def free(self) -> int:
        """Return how many bytes more there is room for."""
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        return shutil.disk_usage(there).free

    def lock(self, *, wait: bool = False) -> FileLock:
        """Lock the name of a file."""
        self._make_parent()
        return FileLock(self.path, wait=wait)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Return the function of every item; small files of a disk are read one after the other."""
        return [function(item) for item in items]

    def _make_parent(self) -> None:
        if not self.path.parent.is_dir():
            self.path.parent.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class _Descriptor:
    """The open file behind `new_file`."""

    fd: int

    def write(self, buffers: Sequence[bytes | np.ndarray]) -> None:
        write_all(self.fd, buffers)


def _link(beside: Path, path: Path) -> None:
    """Give a file its second name; FileExistsError if that is taken."""
    try:
        path.hardlink_to(beside)
    except FileExistsError:
        raise
    except OSError:
        # a file system without hard links; callers hold a lock
        if path.exists():
            raise FileExistsError(path) from None
        beside.replace(path)
