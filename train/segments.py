"""FVU and L0 along entities and along the calendar: where in a history, and when, a dictionary does worse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from activations_cache.store import StoredRows
from sae.codes import SparseCodes
from sae.metrics import Segments

MOST_STRETCHES = 12
"""Stretches of time at most; where there are no more periods than that, each is a stretch."""


class RowSegments:
    """The segments of one split.

    Positions are grouped as 0, 1, 2-3, 4-7, ...; time into stretches of equally many periods, as the first
    batch shows them (rows are stored in shuffled order).
    """

    def __init__(self) -> None:
        self.segments = {"position": Segments(), "time": Segments()}
        self._starts: np.ndarray | None = None
        self._bounds: dict[tuple[str, int], tuple[int, int]] = {}

    def update(self, x: Tensor, x_hat: Tensor, codes: SparseCodes, rows: StoredRows) -> None:
        """Add a batch and where its rows are from."""
        if self._starts is None:
            periods = np.unique(rows.time)
            self._starts = np.array(
                [part[0] for part in np.array_split(periods, MOST_STRETCHES) if len(part)]
            )
        stretch = np.maximum(np.searchsorted(self._starts, rows.time, side="right") - 1, 0)
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
