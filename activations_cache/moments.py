"""Moments of activations, kept while they are written: mergeable, in float64, the counts as integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from sae.errors import StoreError

from .copying import Scratch

_PIECE_ELEMENTS = 1 << 20
_PRODUCT_ELEMENTS = 1 << 13
_GROUP = 32
_CANCELLATION = 100.0
"""Sum of squares over sum of squared deviations beyond which their difference has lost too many digits."""
_TINY = 2.0**-100
"""Largest square of a dimension below which its squares may have lost digits."""


@dataclass(frozen=True)
class Moments:
    """Count, mean, variance, extremes and the distribution of norms of some rows.

    Attributes
    ----------
    count
        Rows.
    mean
        Mean per dimension.
    squares
        Sum over rows of the squared deviation from `mean`, per dimension.
    max_abs
        Largest absolute value per dimension.
    max_norm
        Largest Euclidean norm of a row, to the rounding of float32.
    norm_counts
        Rows per norm bin; bins are `NORM_BINS_PER_OCTAVE` to the doubling from 2 ** `NORM_FIRST_OCTAVE` on,
        the first also holds what is smaller (zero), the last what is larger.
    products
        Sum over rows of the products of two dimensions' deviations; None unless it was asked for.

    Notes
    -----
    Values and squares are summed in float32 over groups of at most 32 rows, the groups in float64. Where the
    mean is large beside the deviations, or a square leaves the range of float32, a dimension is summed again
    about its mean in float64. So the mean is right to 1e-7 of the root mean square and the variance to 1e-5
    of itself whatever the data, and both to 1e-8 or so over many rows; counts and `max_abs` are exact.
    Merging is Chan, Golub and LeVeque's pairwise update; any order of merging gives the same numbers up to
    the rounding of float64, and exactly the same counts and extremes.
    """

    count: int
    mean: Float64[np.ndarray, " d_in"]
    squares: Float64[np.ndarray, " d_in"]
    max_abs: Float32[np.ndarray, " d_in"]
    max_norm: float
    norm_counts: Int64[np.ndarray, " bins"]
    products: Float64[np.ndarray, "d_in d_in"] | None = None

    NORM_BINS_PER_OCTAVE: ClassVar[int] = 32
    NORM_FIRST_OCTAVE: ClassVar[int] = -32
    NORM_BINS: ClassVar[int] = 2048

    @classmethod
    def empty(cls, d_in: int) -> Moments:
        """Return the moments of no rows."""
        zero = np.zeros(d_in)
        return cls(0, zero, zero, np.zeros(d_in, np.float32), 0.0, np.zeros(cls.NORM_BINS, np.int64))

    @classmethod
    def of(
        cls,
        rows: Float32[np.ndarray, "rows d_in"],
        *,
        covariance: bool = False,
        scratch: Scratch | None = None,
    ) -> Moments:
        """Return the moments of some rows, on request with their covariance, in float64.

        Parameters
        ----------
        rows
            The rows.
        covariance
            Whether to sum the products of dimensions too.
        scratch
            Memory to work in; new memory by default.

        Examples
        --------
        >>> Moments.of(np.array([[0.0], [2.0]], np.float32)).variance
        array([1.])
        """
        n, d_in = rows.shape
        if n == 0:
            return cls.empty(d_in)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.vecdot(rows, rows).astype(np.float64)
            sums, squares, largest = _sums(rows, scratch or Scratch())
        mean = sums / n
        deviations = squares - sums * mean
        unsafe = ~((squares <= _CANCELLATION * deviations) & (largest > _TINY) & (largest < np.inf))
        max_abs = np.sqrt(largest)
        if unsafe.any():
            x = rows[:, unsafe]
            mean[unsafe] = x.mean(axis=0, dtype=np.float64)
            deviations[unsafe] = _exact_deviations(x, mean[unsafe])
            max_abs[unsafe] = np.maximum(x.max(axis=0), -x.min(axis=0))
        if not np.isfinite(norms).all():
            norms = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        norms = np.sqrt(norms)
        counts = np.bincount(cls._norm_bin(norms), minlength=cls.NORM_BINS)
        products = _products(rows, mean) if covariance else None
        return cls(n, mean, deviations, max_abs, float(norms.max()), counts, products)

    @classmethod
    def _norm_bin(cls, norms: Float64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        with np.errstate(divide="ignore"):
            octaves = np.log2(norms) - cls.NORM_FIRST_OCTAVE
        octaves = np.clip(octaves, 0, cls.NORM_BINS / cls.NORM_BINS_PER_OCTAVE - 1e-9)
        bins: np.ndarray = (octaves * cls.NORM_BINS_PER_OCTAVE).astype(np.int64)
        return bins

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows together."""
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        products = None
        if self.products is not None and other.products is not None:
            products = self.products + other.products + self.count * share * np.outer(apart, apart)
        return type(self)(
            count,
            self.mean + share * apart,
            self.squares + other.squares + self.count * share * apart**2,
            np.maximum(self.max_abs, other.max_abs),
            max(self.max_norm, other.max_norm),
            self.norm_counts + other.norm_counts,
            products,
        )

    @property
    def variance(self) -> Float64[np.ndarray, " d_in"]:
        """Population variance per dimension."""
        return self.squares / max(self.count, 1)

    @property
    def covariance(self) -> Float64[np.ndarray, "d_in d_in"]:
        """Population covariance of the dimensions.

        Raises
        ------
        StoreError
            It was not asked for when the rows were written.
        """
        if self.products is None:
            raise StoreError(
                "these moments hold no covariance", do="harvest again with harvest.layout.covariance=true"
            )
        return self.products / max(self.count, 1)

    @property
    def scale(self) -> float:
        """Root of the mean over dimensions of the variance: the s in x' = (x - mu) / s."""
        return float(np.sqrt(self.variance.mean()))

    def norm_quantile(self, q: float) -> float:
        """Return the norm that a share q of the rows does not pass, to within one bin (2.2 %).

        Zero norms and norms below 2 ** -32 come back as 2 ** -32; 0 rows give nan.
        """
        if self.count == 0:
            return float("nan")
        below = np.cumsum(self.norm_counts)
        rank = q * self.count
        b = int(np.searchsorted(below, rank, side="left"))
        inside = (rank - (below[b] - self.norm_counts[b])) / max(self.norm_counts[b], 1)
        octave = (b + inside) / self.NORM_BINS_PER_OCTAVE + self.NORM_FIRST_OCTAVE
        return float(min(2.0**octave, max(self.max_norm, 2.0**self.NORM_FIRST_OCTAVE)))

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the moments as named arrays, for a safetensors file."""
        products = {} if self.products is None else {f"{prefix}/products": self.products}
        return products | {
            f"{prefix}/count": np.array([self.count], np.int64),
            f"{prefix}/mean": self.mean,
            f"{prefix}/squares": self.squares,
            f"{prefix}/max_abs": self.max_abs,
            f"{prefix}/max_norm": np.array([self.max_norm]),
            f"{prefix}/norm_counts": self.norm_counts,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], prefix: str) -> Moments:
        """Read what `tensors` returned."""
        parts = {name: tensors[f"{prefix}/{name}"] for name in ("mean", "squares", "max_abs", "norm_counts")}
        count, norm = int(tensors[f"{prefix}/count"][0]), float(tensors[f"{prefix}/max_norm"][0])
        return cls(count=count, max_norm=norm, products=tensors.get(f"{prefix}/products"), **parts)


def _sums(
    rows: Float32[np.ndarray, "rows d_in"],
    scratch: Scratch,
) -> tuple[Float64[np.ndarray, " d_in"], Float64[np.ndarray, " d_in"], Float32[np.ndarray, " d_in"]]:
    """Return per dimension the sum, the sum of squares and the largest square."""
    d_in = rows.shape[1]
    sums, squares, largest = np.zeros(d_in), np.zeros(d_in), np.zeros(d_in, np.float32)
    step = max(_GROUP, _PIECE_ELEMENTS // max(d_in, 1) // _GROUP * _GROUP)
    square = scratch.array("square", (min(step, len(rows)), d_in), "float32")
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        part = square[: len(piece)]
        sums += _column_sums(piece)
        np.multiply(piece, piece, out=part)
        squares += _column_sums(part)
        np.maximum(largest, np.maximum.reduce(part, axis=0), out=largest)
    return sums, squares, largest


def _column_sums(x: Float32[np.ndarray, "rows d_in"]) -> Float64[np.ndarray, " d_in"]:
    """Sum columns: groups of a few rows in float32, the groups in float64."""
    # products this small stay in the calling thread, whatever the linear algebra library
    size = min(_GROUP, max(1, _PRODUCT_ELEMENTS // max(x.shape[1], 1)))
    whole = len(x) // size * size
    groups = np.matmul(np.ones((1, size), np.float32), x[:whole].reshape(-1, size, x.shape[1]))
    total: np.ndarray = groups.sum(axis=(0, 1), dtype=np.float64) + x[whole:].sum(axis=0, dtype=np.float64)
    return total


def _exact_deviations(x: Float32[np.ndarray, "rows d_in"], about: Float64[np.ndarray, " d_in"]) -> np.ndarray:
    """Return per dimension the sum of squared deviations from a value, in float64."""
    total = np.zeros(x.shape[1])
    for start in range(0, len(x), 64):
        apart = x[start : start + 64] - about
        total += np.einsum("ij,ij->j", apart, apart)
    return total


def _products(
    x: Float32[np.ndarray, "rows d_in"], mean: Float64[np.ndarray, " d_in"]
) -> Float64[np.ndarray, "d_in d_in"]:
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), 1024):
        apart = x[start : start + 1024] - mean
        total += apart.T @ apart
    return total


def merge_moments(parts: Iterable[Moments], d_in: int) -> Moments:
    """Return the moments of all parts together, merged in the order given."""
    total = Moments.empty(d_in)
    for part in parts:
        total = total.merge(part)
    return total
