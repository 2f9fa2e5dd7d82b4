"""Trailing windows over months: row i, column k looks at columns k - width + 1 .. k, fewer at the start."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .chain import FloatArray


def lagged(x: FloatArray, months: int = 1) -> FloatArray:
    """Return the value `months` columns earlier, nan where there is none; shape [n, horizon]."""
    out = np.full(x.shape, np.nan)
    out[:, months:] = x[:, :-months]
    return out


def trailing_sum(x: FloatArray, width: int) -> FloatArray:
    """Return the sum over the last `width` months; nan counts as 0."""
    return _fold(np.nan_to_num(x), width, np.add)


def trailing_max(x: FloatArray, width: int) -> FloatArray:
    """Return the maximum over the last `width` months; nan is skipped."""
    return _fold(x, width, np.fmax)


def trailing_min(x: FloatArray, width: int) -> FloatArray:
    """Return the minimum over the last `width` months; nan is skipped."""
    return _fold(x, width, np.fmin)


def _fold(x: FloatArray, width: int, operation: Callable[[FloatArray, FloatArray], FloatArray]) -> FloatArray:
    out = x.astype(np.float64)
    for back in range(1, min(width, x.shape[1])):
        out[:, back:] = operation(out[:, back:], x[:, :-back])
    return out
