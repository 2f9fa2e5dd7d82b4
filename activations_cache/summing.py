"""Sums over rows on their way to disk, from which their moments follow.

Threads that call NumPy wait for each other between any two calls, for longer than a call on a thousand numbers takes. So a
chunk costs a handful of calls, each over all of it, and everything else is done once a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from .copying import Scratch
from .formats import largest_magnitude, to_float32
from .moments import Moments

_GROUP = 32
_PRODUCT_ELEMENTS = 1 << 13
"""Matrices up to which a product stays in the calling thread, whatever the linear algebra library."""
_PRODUCT_ROWS = 1024
_CANCELLATION = 10.0
"""Sum of squares over sum of squared deviations beyond which their difference has lost too many digits."""
_TINY = 2.0**-50
"""Largest absolute value of a dimension below which its squares may have lost digits."""

Pieces = Callable[[np.ndarray], Iterator[Shaped[np.ndarray, "rows _chosen"]]]


class RowSums:
    """Adds up rows that come piece by piece.

    Values and squares are summed in float32 over groups of at most 32 rows, the groups in float64. Where the
    mean is three times the deviations, or a square leaves the range of float32, a dimension is summed again about
    its mean in float64. So the mean is right to 1e-6 of the root mean square and the variance to 1e-5 of itself
    whatever the data, and both to about 1e-7 over many rows; counts and largest values are exact.

    Parameters
    ----------
    dtype
        What stored rows stand for: float32, float16 or bfloat16.
    d_in
        Width of a row.
    covariance
        Whether to sum the products of dimensions too.
    scratch
        Memory to work in.
    """

    def __init__(self, dtype: str, d_in: int, *, covariance: bool, scratch: Scratch) -> None:
        self._dtype, self._d_in, self._covariance, self._scratch = dtype, d_in, covariance, scratch
        self._sums: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []
        self._norms: list[np.ndarray] = []
        self._largest: list[np.ndarray] = []
        self._pivot = np.zeros(d_in)
        self._products = np.zeros((d_in, d_in) if covariance else (0, 0))

    def add(self, stored: Shaped[np.ndarray, "rows d_in"]) -> None:
        """Count some rows, C-contiguous and in the format on disk."""
        if len(stored) == 0:
            return
        rows = self._exact(stored)
        with np.errstate(over="ignore", invalid="ignore"):
            self._norms.append(np.vecdot(rows, rows))
            whole = len(rows) // _GROUP * _GROUP
            for part in (rows[:whole].reshape(-1, _GROUP, self._d_in), rows[None, whole:]):
                if part.size:
                    self._sums.append(_group_sums(part))
                    self._squares.append(np.einsum("gij,gij->gj", part, part))
        self._largest.append(largest_magnitude(stored, axis=0).view(stored.dtype))
        if self._covariance:
            self._add_products(rows)

    def moments(self, again: Pieces) -> Moments:
        """Return the moments of what was added.

        Parameters
        ----------
        again
            Yields the stored rows once more, of the given dimensions only, for what float32 could not sum.
        """
        n = sum(len(norms) for norms in self._norms)
        if n == 0:
            return Moments.empty(self._d_in)
        sums, squares = (np.concatenate(p).sum(axis=0, dtype=np.float64) for p in (self._sums, self._squares))
        (max_abs,) = to_float32(np.maximum.reduce(self._largest)[None], self._dtype)
        norms = np.concatenate(self._norms).astype(np.float64)
        mean = sums / n
        with np.errstate(over="ignore", invalid="ignore"):
            deviations = squares - sums * mean
            safe = (squares <= _CANCELLATION * deviations) & np.isfinite(squares) & (max_abs > _TINY)
        if not safe.all():
            others = np.flatnonzero(~safe)
            mean[others], deviations[others] = self._in_float64(again, others, n)
        if not np.isfinite(norms).all():
            rows = (self._exact(stored).astype(np.float64) for stored in again(np.arange(self._d_in)))
            norms = np.concatenate([np.vecdot(x, x) for x in rows])
        products = None
        if self._covariance:
            apart = mean - self._pivot
            products = self._products - n * np.outer(apart, apart)
        return Moments.of_norms(
            np.sqrt(norms), mean=mean, squares=deviations, max_abs=max_abs, products=products
        )

    def _exact(self, stored: Shaped[np.ndarray, "rows d_in"]) -> Float32[np.ndarray, "rows d_in"]:
        if self._dtype == "float32":
            return stored
        return to_float32(stored, self._dtype, self._scratch.array("exact", stored.shape, "float32"))

    def _in_float64(self, again: Pieces, which: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and squared deviations of some dimensions, summed in float64."""
        sums = squares = np.zeros(len(which))
        for stored in again(which):
            sums = sums + self._exact(stored).sum(axis=0, dtype=np.float64)
        mean = sums / n
        for stored in again(which):
            apart = self._exact(stored) - mean
            squares = squares + np.einsum("ij,ij->j", apart, apart)
        return mean, squares

    def _add_products(self, rows: Float32[np.ndarray, "rows d_in"]) -> None:
        """Add the products of deviations from a value near the mean."""
        if len(self._norms) == 1:
            self._pivot = rows.mean(axis=0, dtype=np.float64)
        for start in range(0, len(rows), _PRODUCT_ROWS):
            apart: Float64[np.ndarray, "n d_in"] = rows[start : start + _PRODUCT_ROWS] - self._pivot
            self._products += apart.T @ apart


def _group_sums(groups: Float32[np.ndarray, "groups n d_in"]) -> Float32[np.ndarray, "groups d_in"]:
    _, n, d_in = groups.shape
    if n * d_in > _PRODUCT_ELEMENTS:
        sums: np.ndarray = np.add.reduce(groups, axis=1)
        return sums
    product: np.ndarray = np.matmul(np.ones((1, n), np.float32), groups)
    return product[:, 0]
