"""Parts of a portfolio: which segment and which stretch of the calendar a judged row belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from sae.errors import ConfigError

from .segments import MOST_STRETCHES

MOST_VALUES = 50
"""Values of a column that may each be a segment; with more, edges are asked for."""


class Part(NamedTuple):
    """Some of the judged rows."""

    name: dict[str, str | float | None]
    """`value`, or `from` (included) and `to`; None: missing, or no bound."""
    rows: Bool[np.ndarray, " n"]


def segments_of(
    panel: Path, segments: Mapping[str, Sequence[float]], rows: Int[np.ndarray, " n"]
) -> dict[str, list[Part]]:
    """Divide rows of a panel by columns of it.

    Parameters
    ----------
    panel
        Its folder.
    segments
        Column, audit columns with `audit_` before their name -> increasing edges e of the segments x < e_0,
        e_0 <= x < e_1, ...; without edges each value is a segment. Rows without a value are one more segment.
    rows
        Which rows of the panel.

    Raises
    ------
    ConfigError
        A column has edges and holds no numbers, or too many values and no edges.
    """
    table = pq.read_table(panel / "panel.parquet", columns=list(segments))
    return {
        name: _by_edges(name, table[name].take(pa.array(rows)), edges)
        if edges
        else _by_value(name, table[name].take(pa.array(rows)))
        for name, edges in segments.items()
    }


def periods_of(time: Int[np.ndarray, " n"]) -> list[Part]:
    """Divide rows into stretches of equally many periods: each period, or twelve stretches where there are more."""
    stretches = [part for part in np.array_split(np.unique(time), MOST_STRETCHES) if len(part)]
    return [
        Part({"from": int(part[0]), "to": int(part[-1])}, (time >= part[0]) & (time <= part[-1]))
        for part in stretches
    ]


def _by_value(name: str, column: pa.ChunkedArray) -> list[Part]:
    values = sorted(value for value in pc.unique(column).to_pylist() if value is not None)
    if len(values) > MOST_VALUES:
        raise ConfigError(
            f"evaluate.segments.{name}: {len(values)} values are too many segments",
            expected=f"at most {MOST_VALUES}",
            do="give edges, such as [0.3, 0.6]",
        )
    parts = [Part({"value": v}, pc.fill_null(pc.equal(column, v), False).to_numpy()) for v in values]
    return parts + _missing(pc.is_null(column).to_numpy())


def _by_edges(name: str, column: pa.ChunkedArray, edges: Sequence[float]) -> list[Part]:
    try:
        numbers = pc.cast(column, pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"evaluate.segments.{name} has edges, but the column holds no numbers",
            got=str(error),
            do="leave the edges out: []",
        ) from error
    unknown = np.isnan(numbers)
    which = np.searchsorted(np.asarray(edges), numbers, side="right")
    bounds = [None, *edges, None]
    parts = [
        Part({"from": bounds[i], "to": bounds[i + 1]}, (which == i) & ~unknown) for i in range(len(edges) + 1)
    ]
    return [part for part in parts if part.rows.any()] + _missing(unknown)


def _missing(rows: np.ndarray) -> list[Part]:
    return [Part({"value": None}, rows)] if rows.any() else []
