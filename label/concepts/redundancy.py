"""Which concept says nearly the same as which other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import rankdata

ROWS_AT_ONCE = 16_384


def similarities(columns: Float[ndarray, "rows n"], *, at_least: int = 100) -> Float[ndarray, "n n"]:
    """Return |Spearman| between every two columns, |phi| where both are truth values; NaN where undefined.

    Ranks are taken once per column over its own rows and correlated over the rows that two columns share,
    which is exact without nulls and for truth values, and close otherwise.

    Parameters
    ----------
    columns
        Values, NaN = null.
    at_least
        Rows that two columns must share to be compared.
    """
    ranks = np.stack([_ranks(column) for column in columns.T], axis=1)
    n = columns.shape[1]
    count, total, square, product = (np.zeros((n, n)) for _ in range(4))
    for start in range(0, len(ranks), ROWS_AT_ONCE):
        block = ranks[start : start + ROWS_AT_ONCE]
        known = (~np.isnan(block)).astype(np.float64)
        filled = np.nan_to_num(block)
        count += known.T @ known
        total += filled.T @ known
        square += (filled**2).T @ known
        product += filled.T @ filled
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance = product / count - total * total.T / count**2
        variance = square / count - (total / count) ** 2
        result = np.abs(covariance) / np.sqrt(variance * variance.T)
    result[(count < at_least) | (variance < 1e-12) | (variance.T < 1e-12)] = np.nan
    return np.minimum(result, 1.0)


def nearest(columns: Mapping[str, Float[ndarray, "rows"]]) -> dict[str, tuple[str, float]]:
    """Return, for each column that can be compared with any, the one most like it and how much."""
    names = list(columns)
    table = similarities(np.stack([columns[name] for name in names], axis=1))
    np.fill_diagonal(table, np.nan)
    found = {}
    for row, name in zip(table, names, strict=True):
        if not np.isnan(row).all():
            best = int(np.nanargmax(row))
            found[name] = (names[best], float(row[best]))
    return found


def _ranks(column: Float[ndarray, "rows"]) -> Float[ndarray, "rows"]:
    """Return average ranks scaled to mean 0 and variance 1, NaN kept; a constant becomes 0."""
    known = ~np.isnan(column)
    ranks = np.full(len(column), np.nan)
    if known.any():
        found = rankdata(column[known])
        spread = found.std()
        ranks[known] = (found - found.mean()) / spread if spread > 0 else 0.0
    return ranks
