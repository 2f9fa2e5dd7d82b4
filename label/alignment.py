"""Bringing tables keyed by (entity, time) onto the rows of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from activations_cache.panel import Panel
from sae.errors import ConceptError

from .concepts.library import ConceptInfo
from .evidence import Rows
from .targets import Coded, code_concept


def locate(
    rows: Rows, entity: Int[np.ndarray, " n"], time: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " rows"]:
    """Return, per row, its index in a table sorted by entity and time, or -1 where the table lacks it."""
    # by number, for nanoseconds times entities would overflow
    times = np.union1d(time, rows.time)
    keys = entity * len(times) + np.searchsorted(times, time)
    wanted = rows.entity * len(times) + np.searchsorted(times, rows.time)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


def code_table(
    path: Path, infos: list[ConceptInfo], rows: dict[str, Rows]
) -> tuple[list[Coded], dict[str, bool]]:
    """Code the concepts of one table of values; also say which numeric ones take whole numbers only.

    Raises
    ------
    ConceptError
        The table lacks a concept that it should hold.
    """
    head = pq.read_table(path, columns=["entity", "time"])
    places = {s: locate(r, head["entity"].to_numpy(), head["time"].to_numpy()) for s, r in rows.items()}
    missing = {info.id for info in infos} - set(pq.read_schema(path).names)
    if missing:
        raise ConceptError(
            f"{path} lacks values of {', '.join(sorted(missing))}", do="evaluate the concepts again"
        )
    coded, whole = [], {}
    for info in infos:
        column = pq.read_table(path, columns=[info.id])[info.id]
        is_known = pc.is_valid(column).to_numpy(zero_copy_only=False)
        numeric = info.type == "float"
        filled = column.fill_null(0.0 if numeric else False).to_numpy(zero_copy_only=False)
        values = {s: filled[p] for s, p in places.items()}
        known = {s: (p >= 0) & is_known[p] for s, p in places.items()}
        if not any(k.any() for k in known.values()):
            continue
        coded.append(code_concept(info.id, "concept", values, known, numeric=numeric))
        whole[info.id] = numeric and bool((filled[is_known] == np.round(filled[is_known])).all())
    return coded, whole


def raw_values(panel: Panel, rows: Rows) -> np.ndarray:
    """Return the panel's columns `[rows, columns]` on the rows of a split."""
    at = locate(rows, panel.entity, panel.time)
    values: np.ndarray = np.where((at >= 0)[:, None], panel.values[at], np.nan)
    return values
