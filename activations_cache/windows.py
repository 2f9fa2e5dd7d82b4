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
from .order import Order, Take, Window
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
    """Rows of memory for a window: which one is in it or on its way, and the order of serving its rows."""

    first: int
    window: Window | None = None
    reading: tuple[Future[None], ...] = ()
    order: Int64[np.ndarray, " rows"] | None = None


class Windows:
    """The windows of a rank's lanes, all in one memory, so that a batch is gathered from them by one call.

    Threads that call often wait for each other longer than a lane's part of a batch takes to copy.

    Parameters
    ----------
    selection
        What is read.
    order
        In which order.
    pool
        Threads that read.
    lanes
        Which lanes.
    """

    def __init__(self, selection: Selection, order: Order, pool: ThreadPoolExecutor, lanes: range) -> None:
        self._selection, self._order, self._pool = selection, order, pool
        longest = int(np.sort(selection.table.rows)[-order.window_chunks :].sum())
        slots = 1 if order.whole else 2
        self._memory = selection.buffers(len(lanes) * slots * longest)
        firsts = iter(range(0, len(lanes) * slots * longest, longest))
        self._lanes = {lane: [_Slot(next(firsts)) for _ in range(slots)] for lane in lanes}

    def fill(self, takes: Sequence[Take], out: Mapping[str, Tensor]) -> None:
        """Copy what is taken of the lanes, one after the other, into `out`, and begin to read what comes next.

        Raises
        ------
        StoreError
            A chunk is missing or damaged; some window is then half read.
        """
        # what the first batch waits for is read before anything that is read ahead
        for take in takes:
            slots = self._lanes[take.lane]
            if all(slot.window is None for slot in slots):
                self._begin(slots[-1], self._order.window(take.epoch, take.lane, take.start))
        gather = _Gather(self._memory, out)
        for epoch, lane, start, stop in takes:
            at = start
            while at < stop:
                slot = self._lanes[lane][0]
                if slot.window is None or slot.order is None or not slot.window.holds(epoch, at):
                    # reading ahead overwrites what this batch may have been given already
                    gather.copy()
                    slot = self._load(self._lanes[lane], self._order.window(epoch, lane, at))
                assert slot.window is not None and slot.order is not None
                first, end = slot.window.first, min(stop, slot.window.first + slot.window.rows)
                gather.add(slot.order[at - first : end - first])
                at = end
        gather.copy()
        assert all(gather.copied == len(target) for target in out.values())

    def _load(self, slots: list[_Slot], window: Window) -> _Slot:
        """Read a window that a lane's first slot does not hold, begin to read the next one, return its slot."""
        slot = slots[0]
        if self._order.whole and slot.order is not None:
            slot.window, slot.order = window, self._permute(slot, window)
            return slot
        slots.reverse()
        slot, spare = slots[0], slots[-1]
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
        reading, at = [], slot.first
        for piece in self._selection.spans(window, whole=self._order.whole):
            reading.append(self._pool.submit(self._selection.read, piece, self._memory, at))
            at += piece[2]
        slot.window, slot.reading, slot.order = window, tuple(reading), None

    def _permute(self, slot: _Slot, window: Window) -> Int64[np.ndarray, " rows"]:
        """Return where in memory the rows of a window are, in the order of serving them."""
        rng = self._order.generator(window.epoch, window.lane, window.number)
        if self._selection.run_length == 1:
            order = rng.permutation(window.rows)
            served = self._selection.served(window, whole=self._order.whole)
            return slot.first + (order if served is None else served[order])
        held = slice(slot.first, slot.first + window.rows)
        entity, position = (self._memory[name][held] for name in ("entity", "position"))
        starts = run_starts(entity, position, self._selection.run_length)
        return slot.first + shuffled_runs(rng, starts, window.rows)


class _Gather:
    """Rows of memory on their way into a batch.

    Attributes
    ----------
    copied
        Rows that are in the batch.
    """

    def __init__(self, memory: Mapping[str, np.ndarray], out: Mapping[str, Tensor]) -> None:
        self._memory, self._out = memory, out
        self._rows: list[np.ndarray] = []
        self.copied = 0

    def add(self, rows: Int64[np.ndarray, " n"]) -> None:
        """Note rows that come next."""
        self._rows.append(rows)

    def copy(self) -> None:
        """Copy what was noted."""
        if not self._rows:
            return
        rows = np.concatenate(self._rows)
        for name, target in self._out.items():
            into = as_array(target[self.copied : self.copied + len(rows)])
            np.take(self._memory[name], rows, axis=0, out=into, mode="clip")
        self.copied += len(rows)
        self._rows.clear()
