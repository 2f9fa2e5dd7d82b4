"""Batches that are gathered row by row: from windows of rows in memory, one ahead of the one being served."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from .batches import BatchMemory
from .block import run_starts, shuffled_runs
from .formats import as_array
from .order import Order, Take, Window
from .selection import Selection

_AHEAD = 2


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
        if not self._order.whole:
            self._begin(spare, self._order.after(window))
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


class Gathering:
    """The next batches of a rank, gathered by a thread of its own, two ahead.

    Parameters
    ----------
    windows
        The rows.
    order
        Which rows a batch takes.
    memory
        Makes batches.
    rank, ranks
        Whose part of them.
    """

    def __init__(self, windows: Windows, order: Order, memory: BatchMemory, rank: int, ranks: int) -> None:
        self._windows, self._order, self._memory = windows, order, memory
        self._rank, self._ranks = rank, ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="assay-batch")
        self._ahead: deque[Future[dict[str, Tensor]]] = deque()

    def take(self, number: int) -> dict[str, Tensor]:
        """Return a batch: any at first, then one after the other.

        Raises
        ------
        StoreError
            A chunk is missing or damaged; nothing can be taken any more.
        """
        while len(self._ahead) <= _AHEAD:
            self._ahead.append(self._thread.submit(self._gather, number + len(self._ahead)))
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop gathering ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _gather(self, number: int) -> dict[str, Tensor]:
        out = self._memory.empty()
        self._windows.fill(self._order.takes(number, self._rank, self._ranks), out)
        return out
