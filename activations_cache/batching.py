"""Cutting histories into batches of one length, so that little is padded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from .panel import Panel


def batches_by_length(
    panel: Panel, entities: Int[np.ndarray, " entities"], batch_rows: int
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Cut entities into batches of at most `batch_rows` padded positions, like lengths together, in a fixed order."""
    return cut_by_length(entities, (panel.offsets[1:] - panel.offsets[:-1])[entities], batch_rows)


def cut_by_length(
    items: Int[np.ndarray, " items"], length: Int[np.ndarray, " items"], batch_rows: int
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Cut items into batches of at most `batch_rows` padded positions (or one item), like lengths together."""
    order = items[np.lexsort((items, length))]
    length = np.sort(length, kind="stable")
    start = 0
    while start < len(order):
        # lengths rise, so the last one of a batch is the padded width
        sizes = np.arange(1, len(order) - start + 1) * length[start:]
        count = max(1, int(np.searchsorted(sizes, batch_rows, side="right")))
        yield order[start : start + count]
        start += count
