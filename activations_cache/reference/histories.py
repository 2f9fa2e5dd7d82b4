"""From panel rows to the padded batches that CreditTransformer reads, and the tables it reads them with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations_cache.inputs import ModelInputs
from activations_cache.panel import Panel

from .credit_transformer import CreditTransformerConfig, signed_log


class Histories(NamedTuple):
    """A batch of whole histories, padded on the right to the longest."""

    values: Float[Tensor, "batch time columns"]
    gap: Int[Tensor, "batch time"]
    real: Bool[Tensor, "batch time"]
    """False where a position is padding."""
    rows: Int[Tensor, "batch time"]
    """The panel row of each position; padding repeats the last one."""

    def to(self, device: torch.device) -> Histories:
        """Return the batch on another device."""
        return Histories(*(part.to(device) for part in self))


def collate(
    panel: Panel, entities: Int[np.ndarray, " batch"], *, stop: np.ndarray | None = None
) -> Histories:
    """Gather whole histories.

    Parameters
    ----------
    panel
        The rows.
    entities
        Codes of the entities, in the order of the batch.
    stop
        Per panel entity, the row at which its history ends early (such as a time cut); default its last.
    """
    start = panel.offsets[entities]
    end = (panel.offsets[1:] if stop is None else stop)[entities]
    length = end - start
    steps = np.arange(int(length.max()))
    rows = np.minimum(start[:, None] + steps, end[:, None] - 1)
    real = steps < length[:, None]
    gap = np.where(steps > 0, panel.time[rows] - panel.time[np.maximum(rows - 1, start[:, None])] - 1, 0)
    return Histories(
        torch.from_numpy(panel.values[rows]),
        torch.from_numpy(np.maximum(gap, 0)),
        torch.from_numpy(real),
        torch.from_numpy(rows),
    )


def credit_inputs(panel: Panel, entities: Int[np.ndarray, " batch"]) -> ModelInputs:
    """Return the call of CreditTransformer for whole histories."""
    histories = collate(panel, entities)
    return ModelInputs.at_rows(panel, histories.rows, histories.real, histories.values, histories.gap)


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


def describe_columns(panel: Panel, rows: Bool[np.ndarray, " rows"], n_knots: int) -> dict[str, list[Any]]:
    """Return knots, centre and spread of every column over the given rows, as CreditTransformerConfig stores them."""
    knots, centre, spread = [], [], []
    for column in range(len(panel.columns)):
        values = panel.values[rows, column].astype(np.float64)
        known = torch.from_numpy(values[np.isfinite(values)])
        level = signed_log(known)
        knots.append(knots_of(known.numpy(), n_knots))
        centre.append(float(level.mean()) if len(known) else 0.0)
        spread.append(max(float(level.std(correction=0)), 1e-3) if len(known) else 1.0)
    return {"knots": knots, "centre": centre, "spread": spread}


def knots_of(known: Float[np.ndarray, " values"], n_knots: int) -> list[float]:
    """Return `n_knots` strictly increasing knots: the distinct values where they are few, else quantiles.

    Too few distinct knots are filled up with equal steps above the last, which cost nothing: no value lies there.
    """
    if known.size == 0:
        return [float(i) for i in range(n_knots)]
    knots = np.unique(known)
    if len(knots) > n_knots:
        knots = np.unique(np.quantile(known, np.linspace(0, 1, n_knots)))
    # knots are used in single precision, where close ones could coincide
    knots = np.unique(knots.astype(np.float32)).astype(np.float64)
    # a step that single precision can tell from the last knot
    step = max(float(knots[-1] - knots[0]), 1.0, abs(float(knots[-1])) * 1e-3)
    extra = knots[-1] + step * np.arange(1, n_knots - len(knots) + 1)
    return [float(k) for k in np.concatenate([knots, extra])]


def model_config(
    panel: Panel, rows: Bool[np.ndarray, " rows"], *, n_knots: int, shape: dict[str, Any]
) -> CreditTransformerConfig:
    """Return the configuration of a model of the given shape that reads this panel's columns."""
    tables = describe_columns(panel, rows, n_knots)
    return CreditTransformerConfig(
        columns=panel.columns,
        knots=tables["knots"],
        centre=tables["centre"],
        spread=tables["spread"],
        **shape,
    )
