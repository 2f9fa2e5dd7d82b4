"""The chunks of a split, in storage order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from .commits import Group
from .schema import Geometry


class Piece(NamedTuple):
    """Rows of one chunk: writer, chunk in the array, first row in the chunk, and where they go."""

    writer: int
    chunk: int
    start: int
    into: slice


class ChunkTable(NamedTuple):
    """The chunks of a split in storage order: writer, number in the array, rows, and rows up to its end."""

    writer: Int64[np.ndarray, " chunks"]
    chunk: Int64[np.ndarray, " chunks"]
    rows: Int64[np.ndarray, " chunks"]
    ends: Int64[np.ndarray, " chunks"]

    @property
    def total(self) -> int:
        """Rows of all chunks."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pieces(self, first: int, last: int) -> Iterator[Piece]:
        """Yield what rows `first` .. `last` of the split consist of."""
        start = int(np.searchsorted(self.ends, first, side="right"))
        for c in range(start, int(np.searchsorted(self.ends, last)) + 1):
            begin = int(self.ends[c] - self.rows[c])
            low, high = max(first, begin), min(last, int(self.ends[c]))
            yield Piece(
                int(self.writer[c]), int(self.chunk[c]), low - begin, slice(low - first, high - first)
            )


def list_chunks(
    groups: Sequence[Group], geometry: Geometry, split: str, blocks: Mapping[int, int] | None = None
) -> ChunkTable:
    """Return the chunks of a split; of each writer the first `blocks` count, all by default."""
    writers, chunks, rows = [], [], []
    for group in groups:
        for commit in group.commits[: None if blocks is None else blocks.get(group.number, 0)]:
            if split in commit.splits:
                part = commit.splits[split]
                starts = np.arange(0, part.rows, geometry.chunk_rows)
                writers.append(np.full(len(starts), group.number, np.int64))
                chunks.append(part.shard * geometry.chunks_per_shard + starts // geometry.chunk_rows)
                rows.append(np.minimum(geometry.chunk_rows, part.rows - starts))
    none = [np.zeros(0, np.int64)]
    writer, chunk, row = (np.concatenate(none + parts) for parts in (writers, chunks, rows))
    return ChunkTable(writer, chunk, row, np.cumsum(row))
