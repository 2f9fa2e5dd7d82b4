"""Small evidence with known answers, for the tests of labelling."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np

from label.evidence import Evidence, Rows, by_feature, rows_of
from label.targets import Coded


def make_rows(n_entities: int, length: int, split: str = "discover") -> Rows:
    entity = np.repeat(np.arange(n_entities), length)
    time = np.tile(np.arange(length), n_entities)
    rows, _ = rows_of(split, entity, time, time)
    return rows


def make_evidence(dense: np.ndarray, rows: Rows) -> Evidence:
    """Evidence of dense activations [rows, d_sae]."""
    row, feature = np.nonzero(dense > 0)
    return by_feature(rows, dense.shape[1], row, feature, dense[row, feature])


def yes_no(
    id_: str,
    truth: np.ndarray,
    known: np.ndarray | None = None,
    splits: tuple[str, ...] = ("discover", "confirm"),
) -> Coded:
    known = np.ones(len(truth), dtype=bool) if known is None else known
    codes = np.where(known, truth, -1).astype(np.int8)
    return Coded(id_, "concept", None, dict.fromkeys(splits, codes))


def peak(work: Callable[[], object]) -> int:
    """Return the most bytes that work holds beside what was there."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
