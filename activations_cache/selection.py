"""What a loader reads: which rows of a store, which arrays of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from .balance import EntityBalance
from .chunks import ChunkTable
from .order import Window
from .schema import ArraySpec
from .shards import ArrayReader
from .store import ActivationStore


@dataclass(frozen=True)
class Selection:
    """What is read: a split of a store, the arrays by name, its chunks, and how long runs stay together.

    With a `balance` only some rows of a chunk are served; what lies between them is read with them.
    """

    store: ActivationStore
    split: str
    names: tuple[str, ...]
    table: ChunkTable
    run_length: int
    balance: EntityBalance | None = None

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """What the arrays look like on disk, by name."""
        specs = self.store.description.arrays()
        return {name: specs[name] for name in self.names}

    def spans(self, window: Window, *, whole: bool) -> list[tuple[int, int, int]]:
        """Return what is read for a window: (chunk, first row, rows), in the order of the buffers."""
        if self.balance is None:
            return list(window.pieces)
        if whole:
            return [(chunk, 0, rows) for chunk, rows in enumerate(self.table.rows.tolist())]
        return [(chunk, int(rows[0]), int(rows[-1] - rows[0]) + 1) for chunk, rows in self._chosen(window)]

    def served(self, window: Window, *, whole: bool) -> Int64[np.ndarray, " rows"] | None:
        """Return which rows of the buffers are a window's; None if they are all, in this order."""
        if self.balance is None:
            return None
        if whole:
            return self.balance.all_served(window.epoch)
        parts, at = [], 0
        for _, rows in self._chosen(window):
            parts.append(at + rows - rows[0])
            at += int(rows[-1] - rows[0]) + 1
        return np.concatenate(parts)

    def _chosen(self, window: Window) -> Iterator[tuple[int, Int64[np.ndarray, " rows"]]]:
        assert self.balance is not None
        for chunk, start, rows in window.pieces:
            yield chunk, self.balance.served(window.epoch, chunk)[start : start + rows]

    def locate(self, name: str, chunk: int) -> tuple[ArrayReader, int]:
        """Return what reads an array's part of a chunk, and the chunk's number there."""
        writer, number = int(self.table.writer[chunk]), int(self.table.chunk[chunk])
        return self.store.reader(writer, self.split, name), number

    def read(self, piece: tuple[int, int, int], buffers: Mapping[str, np.ndarray], at: int) -> None:
        """Read a piece of a chunk into place."""
        chunk, start, rows = piece
        for name in self.names:
            reader, number = self.locate(name, chunk)
            reader.read(number, start, buffers[name][at : at + rows])

    def buffers(self, rows: int) -> dict[str, np.ndarray]:
        """Return empty buffers for so many rows, in the format on disk."""
        return {name: np.empty((rows, *spec.row_shape), spec.dtype) for name, spec in self.specs.items()}
