"""The order in which rows are served: a function of seed and batch number, whatever the number of ranks.

Rows are numbered without end: epoch e serves the numbers [e N, (e + 1) N), and batch t the numbers
[t B, (t + 1) B), so a batch may end one epoch and begin the next. Number g belongs to lane g mod V. The
chunks of an epoch are permuted and laid end to end; lane v has a stretch of exactly as many rows as it has
numbers, cut into windows of W chunks, and the rows of a window are permuted: one by one, or, where they were
shuffled already when they were written, in slices of consecutive rows. Everything is drawn from Philox of
(seed, epoch[, lane, window]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

ChunkRows = Int64[np.ndarray, " chunks"]


class Take(NamedTuple):
    """Rows `start` .. `stop` of what one lane serves in one epoch."""

    epoch: int
    lane: int
    start: int
    stop: int


class Window(NamedTuple):
    """The rows that are in memory together for one lane.

    Attributes
    ----------
    epoch, lane, number
        Which window.
    first, rows
        Which part of what the lane serves in this epoch.
    pieces
        (chunk, first of the rows that it serves, rows), chunks by their number in storage order.
    """

    epoch: int
    lane: int
    number: int
    first: int
    rows: int
    pieces: tuple[tuple[int, int, int], ...]

    def holds(self, epoch: int, row: int) -> bool:
        """Whether a row of what the lane serves in an epoch is in this window."""
        return epoch == self.epoch and self.first <= row < self.first + self.rows


class Slices(NamedTuple):
    """How the rows of a window are served, in storage order.

    Attributes
    ----------
    first
        Row at which each slice begins, counted through the window's pieces.
    served
        Which row that is of all that the lane ever serves.
    rows
        Rows that follow one another in both.
    """

    first: Int64[np.ndarray, " slices"]
    served: Int64[np.ndarray, " slices"]
    rows: Int64[np.ndarray, " slices"]


@dataclass(frozen=True)
class _Epoch:
    """One epoch: chunks in order, the row at which each begins, the row at which each lane begins."""

    chunks: Int64[np.ndarray, " chunks"]
    begins: Int64[np.ndarray, " chunks_and_end"]
    lanes: Int64[np.ndarray, " lanes_and_end"]


class Order:
    """The order of one selection.

    Parameters
    ----------
    chunk_rows
        Rows that each chunk serves, in storage order; where that differs between epochs, a function of the
        epoch, with the same sum for all.
    batch_size
        Rows of a batch over all ranks.
    lanes
        Number of lanes; the number of ranks has to divide it.
    window_chunks
        Chunks of one lane's window; 0 = the whole selection is one window of one lane.
    seed
        Of all permutations.
    slice_rows
        Consecutive stored rows that stay together within a window; at most a lane's share of a batch.
    """

    def __init__(
        self,
        chunk_rows: ChunkRows | Callable[[int], ChunkRows],
        *,
        batch_size: int,
        lanes: int,
        window_chunks: int,
        seed: int,
        slice_rows: int = 1,
    ) -> None:
        self.slice_rows = slice_rows
        self.whole = window_chunks == 0
        self._chunk_rows = chunk_rows if callable(chunk_rows) else lambda _: chunk_rows
        first = self._chunk_rows(0)
        self.rows = int(first.sum())
        self.batch_size, self.seed = batch_size, seed
        self.lanes = 1 if self.whole else lanes
        self.window_chunks = window_chunks or len(first)
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def generator(self, *where: int) -> np.random.Generator:
        """Return the generator of an epoch, or of a window."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *where])))

    def lanes_of(self, rank: int, ranks: int) -> range:
        """Return the lanes that one rank serves; all serve from the one where the selection is one window."""
        return range(1) if self.whole else range(rank * self.lanes // ranks, (rank + 1) * self.lanes // ranks)

    def takes(self, batch: int, rank: int, ranks: int) -> list[Take]:
        """Return what one rank serves of a batch, in order; the ranks' parts in sequence are the batch."""
        first, last = batch * self.batch_size, (batch + 1) * self.batch_size
        mine = self.lanes_of(rank, ranks)
        if self.whole:
            share = self.batch_size // ranks
            first = first + rank * share
            last = first + share
        found = []
        for lane in mine:
            for epoch in range(first // self.rows, (last - 1) // self.rows + 1):
                origin = epoch * self.rows
                before = self._below(origin, lane)
                start = self._below(max(first, origin), lane) - before
                stop = self._below(min(last, origin + self.rows), lane) - before
                if stop > start:
                    found.append(Take(epoch, lane, start, stop))
        return found

    def window(self, epoch: int, lane: int, row: int) -> Window:
        """Return the window that holds a row of what a lane serves in an epoch."""
        plan = self._epoch(epoch)
        low, high = int(plan.lanes[lane]), int(plan.lanes[lane + 1])
        first_chunk = int(np.searchsorted(plan.begins, low, side="right")) - 1
        end_chunk = int(np.searchsorted(plan.begins, high, side="left"))
        number = (
            int(np.searchsorted(plan.begins, low + row, side="right")) - 1 - first_chunk
        ) // self.window_chunks
        begin = first_chunk + number * self.window_chunks
        end = min(end_chunk, begin + self.window_chunks)
        pieces = []
        for k in range(begin, end):
            start, stop = max(low, int(plan.begins[k])), min(high, int(plan.begins[k + 1]))
            if stop > start:
                pieces.append((int(plan.chunks[k]), start - int(plan.begins[k]), stop - start))
        first = max(low, int(plan.begins[begin])) - low
        return Window(epoch, lane, number, first, sum(rows for _, _, rows in pieces), tuple(pieces))

    def window_at(self, lane: int, served: int) -> Window:
        """Return the window that holds a row of all that a lane ever serves."""
        epoch = (served * self.lanes + lane) // self.rows
        return self.window(epoch, lane, served - self._below(epoch * self.rows, lane))

    def before(self, window: Window) -> int:
        """Count the rows that a lane serves before a window, in all epochs."""
        return self._below(window.epoch * self.rows, window.lane) + window.first

    def after(self, window: Window) -> Window:
        """Return the lane's next window, in a later epoch if need be."""
        return self.window_at(window.lane, self.before(window) + window.rows)

    def slices(self, window: Window) -> Slices:
        """Return how a window is served: in permuted slices, cut where a batch ends."""
        ends = np.cumsum([rows for _, _, rows in window.pieces]).tolist()
        starts = np.concatenate(
            [np.arange(a, b, self.slice_rows) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        )
        chosen = self.generator(window.epoch, window.lane, window.number).permutation(len(starts))
        share, first = self.batch_size // self.lanes, starts[chosen]
        rows = np.diff(starts, append=window.rows)[chosen]
        served = self.before(window) + np.cumsum(rows) - rows
        # no slice is longer than a lane's share of a batch, so at most one batch ends in it
        head = np.minimum(rows, share - served % share)
        rest = np.flatnonzero(head < rows)
        first = np.concatenate([first, first[rest] + head[rest]])
        served = np.concatenate([served, served[rest] + head[rest]])
        rows = np.concatenate([head, rows[rest] - head[rest]])
        stored = np.argsort(first)
        return Slices(first[stored], served[stored], rows[stored])

    def _below(self, number: int, lane: int) -> int:
        """Count the numbers below `number` that belong to a lane."""
        return (number - lane + self.lanes - 1) // self.lanes

    def _lane_rows(self, epoch: int, lane: int) -> int:
        return self._below((epoch + 1) * self.rows, lane) - self._below(epoch * self.rows, lane)

    def _make_epoch(self, epoch: int) -> _Epoch:
        rows = self._chunk_rows(epoch)
        n = len(rows)
        chunks = np.arange(n) if self.whole else self.generator(epoch).permutation(n)
        begins = np.concatenate([[0], np.cumsum(rows[chunks])]).astype(np.int64)
        lanes = np.cumsum([0, *(self._lane_rows(epoch, lane) for lane in range(self.lanes))])
        return _Epoch(chunks, begins, lanes)
