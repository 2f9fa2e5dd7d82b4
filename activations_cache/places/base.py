"""What a store needs of the place where it lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np

from sae.errors import StoreError

from .pieces import Pieces, pieces_of

A = TypeVar("A")
B = TypeVar("B")


class LockedError(StoreError):
    """Somebody else holds a lock, or took it over."""


class TakenError(StoreError):
    """Something else is there already."""


class Lock(Protocol):
    """An exclusive lock.

    Attributes
    ----------
    final
        Whether whoever held it before has certainly stopped. Where it has not, a holder that only slept may wake
        up and go on, so everything that counts has to be made with `Place.create`, and nothing may be removed
        under a name that could be used again.
    """

    final: ClassVar[bool]

    @property
    def released(self) -> bool:
        """Whether it is no longer held."""

    def check(self) -> None:
        """Raise LockedError if somebody else has taken it over."""

    def release(self) -> None:
        """Let others have it; a second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class NewFile(Protocol):
    """A file that is being written, from its first byte to its last."""

    def write(self, buffers: Sequence[bytes | np.ndarray]) -> None:
        """Append all buffers."""


class Place(ABC):
    """A file or folder, or an object or prefix. Folders come into being with what is put into them.

    Attributes
    ----------
    threads
        How many threads it takes to keep it busy.
    poll_seconds
        How often it may be asked whether something has changed.
    remembers
        Whether what was read a moment ago comes from memory when it is read again.
    """

    threads: ClassVar[int]
    poll_seconds: ClassVar[float]
    remembers: ClassVar[bool]

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of its name."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What names it wherever a process runs."""

    @property
    @abstractmethod
    def parent(self) -> Self:
        """The folder that it is in."""

    @abstractmethod
    def __truediv__(self, name: str) -> Self:
        """Return a place in it, however deep."""

    @abstractmethod
    def read(self) -> bytes:
        """Return the whole content; StoreError if there is none."""

    def read_into(self, buffers: Sequence[np.ndarray], offset: int) -> None:
        """Fill C-contiguous arrays, one after the other, from `offset` on.

        Raises
        ------
        StoreError
            There is no such file, or it ends before the arrays are full.
        """
        self.scatter(pieces_of(buffers), offset)

    @abstractmethod
    def scatter(self, pieces: Pieces, offset: int) -> None:
        """Fill pieces of memory, one after the other, from `offset` on.

        Raises
        ------
        StoreError
            There is no such file, or it ends before the pieces are full.
        """

    @abstractmethod
    def expect(self, offset: int, size: int) -> None:
        """Say that some bytes will be read soon; returns at once, and a missing file is the reader's affair."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Replace the whole content, durably: afterwards the old or the new is there, never a part."""

    @abstractmethod
    def create(self, data: bytes) -> None:
        """Write the content, durably, if there is none; of several at once one succeeds.

        Raises
        ------
        TakenError
            There is other content.
        """

    @abstractmethod
    def new_file(self) -> AbstractContextManager[NewFile]:
        """Write piece by piece; the content appears, whole, at the end of the block, and not if it raises.

        It is durable after `sync` of the folder. Where a lock cannot be final, TakenError if there is other
        content.
        """

    @abstractmethod
    def make(self) -> set[Self]:
        """Make this folder if need be; return the folders that have to be synced once there are files in it."""

    @abstractmethod
    def sync(self) -> None:
        """Make the names of the files in this folder durable."""

    @abstractmethod
    def remove(self) -> None:
        """Remove one file, if it is there."""

    @abstractmethod
    def size(self) -> int | None:
        """Return the bytes of a file; None if there is none."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file in this folder, however deep, by its name from here."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one, sorted."""

    @abstractmethod
    def free(self) -> int | None:
        """Return how many bytes more there is room for; None if there is no bound."""

    @abstractmethod
    def lock(self, *, wait: bool = False) -> Lock:
        """Lock the name of a file; `wait` for another holder instead of raising LockedError."""

    @abstractmethod
    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Return the function of every item, in order; at once where many small reads go better together."""


def too_short(place: Place, missing: int, offset: int) -> StoreError:
    """Return the error of a file that ends before what was asked of it."""
    return StoreError(
        f"{place} is too short", got=f"{missing} bytes short at {offset}", do="restore it from a copy"
    )
