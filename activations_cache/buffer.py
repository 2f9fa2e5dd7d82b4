"""Memory for rows between the model and the disk: a row's slot is used again once the row is on its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from .formats import to_stored
from .schema import ArraySpec

_PIECE_BYTES = 4 << 20


class FreeSlots(NamedTuple):
    """Slots that hold no row, and how many returns of slots are counted in; a value, like a position."""

    slots: Int64[np.ndarray, " free"]
    returns: int


class RowBuffer:
    """Rows in the format on disk, each in a slot of its own, in no order.

    One thread takes slots and fills them; others read and return them. What is taken is only known to the
    `FreeSlots` that the taker keeps, so whoever is interrupted before keeping the new value has taken nothing.

    Parameters
    ----------
    specs
        The arrays, by name.
    rows
        Number of slots.

    Attributes
    ----------
    arrays
        The memory of each array, by slot.
    wait_seconds
        Time that takers have waited.
    """

    def __init__(self, specs: Mapping[str, ArraySpec], rows: int) -> None:
        self.arrays = {name: np.empty((rows, *spec.row_shape), spec.dtype) for name, spec in specs.items()}
        self._logical = {name: spec.logical_dtype for name, spec in specs.items()}
        self.all_free = FreeSlots(np.arange(rows), 0)
        self._changed = threading.Condition()
        self._returned: dict[int, Int64[np.ndarray, " n"]] = {}
        self._returns = 0
        self.wait_seconds = 0.0

    def give_back(self, slots: Int64[np.ndarray, " n"]) -> None:
        """Return slots whose rows are no longer needed."""
        with self._changed:
            self._returned[self._returns] = slots
            self._returns += 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Let a taker that waits look again at whether it should stop."""
        with self._changed:
            self._changed.notify_all()

    def take(
        self, free: FreeSlots, n: int, *, check: Callable[[], None]
    ) -> tuple[Int64[np.ndarray, " n"], FreeSlots]:
        """Return `n` slots and what is free then; waits until so many are.

        Parameters
        ----------
        free
            What is free now, from the call before.
        n
            How many, at most the slots there are.
        check
            Called before each wait; raises if there is nothing to wait for.
        """
        found, have, returns = [free.slots], len(free.slots), free.returns
        with self._changed:
            for number in [k for k in self._returned if k < free.returns]:
                del self._returned[number]
            while have < n:
                while returns not in self._returned:
                    check()
                    since = time.perf_counter()
                    self._changed.wait()
                    self.wait_seconds += time.perf_counter() - since
                found.append(self._returned[returns])
                have += len(found[-1])
                returns += 1
        slots = np.concatenate(found) if len(found) > 1 else free.slots
        return slots[:n], FreeSlots(slots[n:], returns)

    def put(self, name: str, slots: Int64[np.ndarray, " n"], rows: Float[np.ndarray, "n d_in"]) -> None:
        """Write rows of one array into slots, in the format on disk."""
        target = self.arrays[name]
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
            to_stored(rows, target[slots[0] : slots[0] + len(slots)], self._logical[name])
            return
        # a row as one opaque item: copied whole
        row = np.dtype((np.void, target.itemsize * target.shape[1]))
        if rows.dtype == target.dtype and rows.flags.c_contiguous:
            target.view(row)[slots] = rows.view(row)
            return
        step = max(1, _PIECE_BYTES // row.itemsize)
        piece = np.empty((min(step, len(slots)), target.shape[1]), target.dtype)
        for i in range(0, len(slots), step):
            part = piece[: len(rows[i : i + step])]
            to_stored(rows[i : i + step], part, self._logical[name])
            target.view(row)[slots[i : i + step]] = part.view(row)
