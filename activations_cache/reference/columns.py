"""The tables with which CreditTransformer reads the columns of a panel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from activations_cache.panel import Panel

from .credit_transformer import CreditTransformerConfig, signed_log


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
