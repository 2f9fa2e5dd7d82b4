"""Batches that are filled by the reading itself: slices of a window go from the files to where they are served.

Row q of all that a lane ever serves belongs to batch q // share, share being the lane's rows of a batch. So where
the slices of a window go is known before it is read, and the batches from the next one on to the end of the windows
that are being read form a ring of memory: made when the first window reaches into them, handed out when the last
has. When a lane enters a window, reading of its next one begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from .batches import BatchMemory
from .order import Order, Window
from .places.pieces import Pieces
from .selection import Selection
from .shards import ArrayReader

_TASK_BYTES = 1 << 20
_AHEAD = 4
"""Tasks by which the disk is ahead of the threads while these compare checksums."""


class _Batch(NamedTuple):
    """A batch that is being filled, and the address of each of its arrays."""

    rows: dict[str, Tensor]
    addresses: Int64[np.ndarray, " names"]


class _Read(NamedTuple):
    """Rows of one chunk of one array, and the memory that they go to."""

    reader: ArrayReader
    chunk: int
    start: int
    pieces: Pieces


@dataclass(frozen=True)
class _Task:
    """What one thread reads; holds on to the batches, for what it writes to are addresses."""

    reads: list[_Read]
    batches: list[_Batch]

    def expect(self) -> None:
        """Tell the disk what will be read."""
        for read in self.reads:
            read.reader.expect(read.chunk)

    def run(self, later: _Task | None) -> None:
        """Read, once the disk knows what comes later."""
        if later is not None:
            later.expect()
        for read in self.reads:
            read.reader.scatter(read.chunk, read.start, read.pieces)


class _Reading(NamedTuple):
    """A window that is read or on its way: rows `begin` .. `end` of all that its lane ever serves."""

    window: Window
    begin: int
    end: int
    tasks: list[Future[None]]


class Ring:
    """The next batches of a rank.

    Parameters
    ----------
    selection
        What is read.
    order
        In which order.
    pool
        Threads that read.
    lanes
        The rank's lanes.
    memory
        Makes batches.
    """

    def __init__(
        self, selection: Selection, order: Order, pool: ThreadPoolExecutor, lanes: range, memory: BatchMemory
    ) -> None:
        self._selection, self._order, self._pool = selection, order, pool
        self._lanes, self._memory = lanes, memory
        self._share = order.batch_size // order.lanes
        self._readings: dict[int, deque[_Reading]] = {lane: deque() for lane in lanes}
        self._batches: dict[int, _Batch] = {}
        self._past: _Batch | None = None
        self._next = 0
        specs = selection.specs
        self._widths = [specs[name].row_bytes for name in selection.names]

    def take(self, number: int) -> dict[str, Tensor]:
        """Return a batch: any at first, then one after the other.

        Raises
        ------
        StoreError
            A chunk is missing or damaged; nothing can be taken any more.
        """
        self._next = number
        begin, end = number * self._share, (number + 1) * self._share
        # what this batch waits for is read before anything that is read ahead
        for lane, readings in self._readings.items():
            while not readings or readings[-1].end < end:
                self._read_next(lane, begin)
        for lane, readings in self._readings.items():
            while readings[-1].begin < end:
                self._read_next(lane, begin)
        self._past = None
        needed = [one for readings in self._readings.values() for one in readings if one.begin < end]
        wait([task for one in needed for task in one.tasks])
        for one in needed:
            for task in one.tasks:
                task.result()
            one.tasks.clear()
        for readings in self._readings.values():
            while readings[0].end <= end:
                readings.popleft()
        return self._batches.pop(number).rows

    def close(self) -> None:
        """Give up what is being read."""
        for readings in self._readings.values():
            for reading in readings:
                for task in reading.tasks:
                    task.cancel()

    def _read_next(self, lane: int, begin: int) -> None:
        """Begin to read a lane's next window, the first time the one that holds row `begin`."""
        readings = self._readings[lane]
        window = self._order.after(readings[-1].window) if readings else self._order.window_at(lane, begin)
        before = self._order.before(window)
        tasks = [*self._tasks(window)]
        for task in tasks[:_AHEAD]:
            task.expect()
        later = [*tasks[_AHEAD:], *[None] * _AHEAD]
        reads = [self._pool.submit(task.run, what) for task, what in zip(tasks, later, strict=False)]
        readings.append(_Reading(window, before, before + window.rows, reads))

    def _tasks(self, window: Window) -> Iterator[_Task]:
        """Cut the reading of a window into pieces of work."""
        slices = self._order.slices(window)
        number, row = np.divmod(slices.served, self._share)
        row += (window.lane - self._lanes.start) * self._share
        first = int(number.min())
        batches = self._reach(first, int(number.max()))
        addresses = np.array([batch.addresses for batch in batches])[number - first]
        pieces = [
            np.stack([addresses[:, i] + row * width, slices.rows * width], axis=1)
            for i, width in enumerate(self._widths)
        ]
        reads: list[_Read] = []
        size, at, done = 0, 0, 0
        for chunk, start, rows in window.pieces:
            done += rows
            to = int(np.searchsorted(slices.first, done))
            for name, parts in zip(self._selection.names, pieces, strict=True):
                reader, inside = self._selection.locate(name, chunk)
                reads.append(_Read(reader, inside, start, parts[at:to]))
            at, size = to, size + rows * sum(self._widths)
            if size >= _TASK_BYTES or done == window.rows:
                yield _Task(reads, batches)
                reads, size = [], 0

    def _reach(self, first: int, last: int) -> list[_Batch]:
        """Return batches `first` .. `last`, made if need be; one that nobody looks at for those served before."""
        numbers = range(max(first, self._next), last + 1)
        for number in numbers:
            if number not in self._batches:
                self._batches[number] = self._new()
        if first < self._next and self._past is None:
            self._past = self._new()
        past = [self._past] * (self._next - first) if self._past else []
        return past + [self._batches[number] for number in numbers]

    def _new(self) -> _Batch:
        rows = self._memory.empty()
        return _Batch(rows, np.array([rows[name].data_ptr() for name in self._selection.names], np.int64))
