"""Windows of rows in memory: read by threads into reused buffers, one ahead of the one being served."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from .balance import EntityBalance
from .block import run_starts, shuffled_runs
from .chunks import ChunkTable
from .formats import as_array
from .order import Order, Window
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

    def read(self, piece: tuple[int, int, int], buffers: Mapping[str, np.ndarray], at: int) -> None:
        """Read a piece of a chunk into place."""
        chunk, start, rows = piece
        writer, number = int(self.table.writer[chunk]), int(self.table.chunk[chunk])
        for name in self.names:
            self.store.reader(writer, self.split, name).read(number, start, buffers[name][at : at + rows])

    def buffers(self, rows: int) -> dict[str, np.ndarray]:
        """Return empty buffers for so many rows, in the format on disk."""
        specs = self.store.description.arrays()
        return {name: np.empty((rows, *specs[name].row_shape), specs[name].dtype) for name in self.names}


class Recycler:
    """Gives out arrays again once nothing uses their memory, which spares the making of new pages.

    A tensor made from an array holds a reference to it for as long as any view or graph needs the memory, so
    the count of references tells. Beyond `kept` arrays of one name, new ones are made and not kept.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._arrays: dict[str, list[np.ndarray]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an array with any content; all of one name have the same shape."""
        arrays = self._arrays.setdefault(name, [])
        for i in range(len(arrays)):
            if _references(arrays, i) <= _UNUSED:
                return arrays[i]
        fresh = np.empty(shape, dtype)
        if len(arrays) < self._kept:
            arrays.append(fresh)
        return fresh


def _references(items: Sequence[object], i: int) -> int:
    return sys.getrefcount(items[i])


_UNUSED = _references([object()], 0)


@dataclass
class _Slot:
    """A window's buffers, which window is in them or on its way, and the order of serving its rows."""

    buffers: dict[str, np.ndarray]
    window: Window | None = None
    reading: tuple[Future[None], ...] = ()
    order: Int64[np.ndarray, " rows"] | None = None


class Lane:
    """Serves the rows of one lane, window by window.

    Parameters
    ----------
    selection
        What is read.
    order
        In which order.
    pool
        Threads that read.
    """

    def __init__(self, selection: Selection, order: Order, pool: ThreadPoolExecutor) -> None:
        self._selection, self._order, self._pool = selection, order, pool
        longest = int(np.sort(selection.table.rows)[-order.window_chunks :].sum())
        self._slots = [_Slot(selection.buffers(longest)) for _ in range(1 if order.whole else 2)]

    def begin(self, epoch: int, lane: int, row: int) -> None:
        """Begin to read the window that holds a row, unless some window is in memory or on its way."""
        if all(slot.window is None for slot in self._slots):
            self._begin(self._slots[-1], self._order.window(epoch, lane, row))

    def take(
        self, epoch: int, lane: int, start: int, stop: int, *, out: Mapping[str, Tensor], at: int
    ) -> int:
        """Copy rows `start` .. `stop` of the lane's epoch into `out` from row `at`; return the next row."""
        while start < stop:
            slot = self._slots[0]
            window = slot.window
            if window is None or slot.order is None or not window.holds(epoch, start):
                window = self._order.window(epoch, lane, start)
                slot = self._load(window)
                assert slot.order is not None
            end = min(stop, window.first + window.rows)
            chosen = slot.order[start - window.first : end - window.first]
            for name, target in out.items():
                into = as_array(target[at : at + len(chosen)])
                np.take(slot.buffers[name], chosen, axis=0, out=into, mode="clip")
            start, at = end, at + len(chosen)
        return at

    def _load(self, window: Window) -> _Slot:
        """Read a window that the first slot does not hold, begin to read the next one, return its slot."""
        slot = self._slots[0]
        if self._order.whole and slot.order is not None:
            slot.window, slot.order = window, self._permute(slot, window)
            return slot
        self._slots.reverse()
        slot, spare = self._slots[0], self._slots[-1]
        if slot.window != window:
            self._begin(slot, window)
        for future in slot.reading:
            future.result()
        slot.order = self._permute(slot, window)
        ahead = None if self._order.whole else self._order.after(window)
        if ahead is not None:
            self._begin(spare, ahead)
        return slot

    def _begin(self, slot: _Slot, window: Window) -> None:
        wait(slot.reading)
        reading, at = [], 0
        for piece in self._selection.spans(window, whole=self._order.whole):
            reading.append(self._pool.submit(self._selection.read, piece, slot.buffers, at))
            at += piece[2]
        slot.window, slot.reading, slot.order = window, tuple(reading), None

    def _permute(self, slot: _Slot, window: Window) -> Int64[np.ndarray, " rows"]:
        rng = self._order.generator(window.epoch, window.lane, window.number)
        if self._selection.run_length == 1:
            order = rng.permutation(window.rows)
            served = self._selection.served(window, whole=self._order.whole)
            return order if served is None else served[order]
        entity, position = (slot.buffers[name][: window.rows] for name in ("entity", "position"))
        return shuffled_runs(rng, run_starts(entity, position, self._selection.run_length), window.rows)
