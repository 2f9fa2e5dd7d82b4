"""FVU and L0 along entities and along the calendar: where in a history, and when, a dictionary does worse."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from activations_cache.store import ActivationStore, StoredRows
from sae.codes import SparseCodes
from sae.metrics import Segments

MOST_STRETCHES = 12
"""Stretches of time at most; where there are no more periods than that, each is a stretch."""

MOST_PERIODS = 2**16
"""Periods that are told apart; where there are more times, such as seconds, neighbouring ones count as one."""

ROWS_AT_ONCE = 65536
"""Rows of which the times are read at once."""


class RowSegments:
    """The segments of one split.

    Positions are grouped as 0, 1, 2-3, 4-7, ...; time into stretches of equally many periods.

    Parameters
    ----------
    starts
        Where the stretches begin; see `find_stretches`.
    """

    def __init__(self, starts: Int64[np.ndarray, " stretches"]) -> None:
        self.segments = {"position": Segments(), "time": Segments()}
        self._starts = starts
        self._bounds: dict[tuple[str, int], tuple[int, int]] = {}

    def update(self, x: Tensor, x_hat: Tensor, codes: SparseCodes, rows: StoredRows) -> None:
        """Add a batch and where its rows are from."""
        stretch = np.searchsorted(self._starts, rows.time, side="right") - 1
        # the exponent of a float is the number of its binary digits
        doubling = np.frexp(rows.position.astype(np.float64))[1]
        for name, values, keys in (("position", rows.position, doubling), ("time", rows.time, stretch)):
            self.segments[name].update(x, x_hat, codes, segment=torch.from_numpy(keys.astype(np.int64)))
            for key in np.unique(keys).tolist():
                seen = values[keys == key]
                low, high = self._bounds.get((name, key), (seen[0], seen[0]))
                self._bounds[name, key] = (min(int(seen.min()), int(low)), max(int(seen.max()), int(high)))

    def compute(self) -> dict[str, list[dict[str, int | float]]]:
        """Return for `position` and `time` the segments in order: `from`, `to` (included), `rows`, `fvu`, `l0`."""
        return {
            name: [
                {"from": self._bounds[name, key][0], "to": self._bounds[name, key][1], **measured}
                for key, measured in segments.compute().items()
            ]
            for name, segments in self.segments.items()
        }


def find_stretches(store: ActivationStore, split: str) -> Int64[np.ndarray, " stretches"]:
    """Return where stretches of equally many of a split's periods begin, from one pass over its times.

    Raises
    ------
    StoreError
        A chunk is damaged.
    """
    periods, shift = np.empty(0, np.int64), 0
    for rows in store.rows_of([], split, batch_rows=ROWS_AT_ONCE):
        periods = np.union1d(periods, rows.time >> shift)
        while len(periods) > MOST_PERIODS:
            periods, shift = np.unique(periods >> 1), shift + 1
    starts = [part[0] for part in np.array_split(periods, MOST_STRETCHES) if len(part)]
    return np.array(starts, np.int64) << shift
