"""Moments of activations, kept while they are written: mergeable, in float64, the counts as integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from sae.errors import StoreError


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
    def of_norms(
        cls,
        norms: Float64[np.ndarray, " rows"],
        *,
        mean: Float64[np.ndarray, " d_in"],
        squares: Float64[np.ndarray, " d_in"],
        max_abs: Float32[np.ndarray, " d_in"],
        products: Float64[np.ndarray, "d_in d_in"] | None = None,
    ) -> Moments:
        """Return the moments of rows with these norms."""
        counts = np.bincount(cls._norm_bin(norms), minlength=cls.NORM_BINS)
        return cls(len(norms), mean, squares, max_abs, float(norms.max()), counts, products)

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

        Zero norms and norms below 2 ** -32 come back as 2 ** -32, those from 2 ** 32 on as the largest of all;
        0 rows give nan.
        """
        if self.count == 0:
            return float("nan")
        below = np.cumsum(self.norm_counts)
        rank = q * self.count
        b = int(np.searchsorted(below, rank, side="left"))
        if b == self.NORM_BINS - 1:
            return self.max_norm
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


def merge_moments(parts: Iterable[Moments], d_in: int) -> Moments:
    """Return the moments of all parts together, merged in the order given."""
    total = Moments.empty(d_in)
    for part in parts:
        total = total.merge(part)
    return total
