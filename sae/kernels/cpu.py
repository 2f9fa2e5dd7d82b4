"""Kernels for a CPU: torch multiplies, numpy selects (its partition is vectorised) and scipy transposes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, Int16
from scipy.sparse import csr_array
from torch import Tensor

from sae.codes import SparseCodes, subset

from .explanation import Explanation, explain_sparsely
from .portable import STACKED, PortableKernels
from .sparse import ROWS_PER_CHUNK

TILE = 32
"""Columns of which one maximum is kept; with 32 to 64 few more than k entries reach the bound they give."""

DENSE_EXPLANATION = 1 / 12
"""Share of the dead features from which on dense products are cheaper for AuxK; 1/20 with AVX-512."""

TILES = 4
"""Tiles per candidate that a bf16 product is cut into at least; then few more entries reach their bound than are wanted."""

Array = npt.NDArray[Any]


class CpuKernels(PortableKernels):
    """The portable kernels with what torch does slowly on a CPU done otherwise. See `Kernels` for the contract.

    The k-th largest of a row's tile maxima is a lower bound on its k-th largest entry, and only the few tiles
    that reach it are looked at again. Products in bf16 are compared by their bits, which are half as many bytes; what is
    not finite is therefore multiplied in full precision, for the sign of a NaN says nothing.
    """

    def largest(self, pre: Float[Tensor, "chunk d_sae"], k: int, lowest: float) -> SparseCodes:
        """Return the k largest entries of each row that exceed `lowest`; ties go to the lower feature."""
        whole, width = pre.numpy(), pre.shape[1]
        tiled = width % TILE == 0 and width >= 2 * k * TILE
        maxima = pre.view(len(pre), -1, TILE).amax(2).numpy() if tiled else whole
        bound = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k :]
        if np.isnan(bound).any():
            return super().largest(pre, k, lowest)
        least = np.nextafter(whole.dtype.type(lowest), whole.dtype.type(np.inf))
        bound = np.maximum(bound[:, :1], least)
        places = _in_tiles(whole, maxima, bound) if tiled else np.flatnonzero(whole >= bound)
        values, starts = whole.ravel()[places], _starts(places, whole)
        return _codes(whole, places[_among_largest(values, starts, k)])

    def propose(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        k: int,
        lowest: float,
    ) -> SparseCodes:
        """Return, without values, the k largest entries of each row that exceed `lowest`, or more, of a product in bf16."""
        return self._numbered([_candidates(pre, k, lowest) for pre, _ in self.products(x, W, b)], len(W))

    def best(self, codes: SparseCodes, k: int, lowest: float) -> SparseCodes:
        """Return the k largest of each row's candidates that exceed `lowest`; ties go to the lower feature."""
        values, starts = codes.values.detach().numpy(), codes.offsets.numpy()
        kept = ~(values <= lowest)
        ranked = np.where(np.isnan(values), np.inf, values)
        for row in range(0, codes.rows, ROWS_PER_CHUNK):
            own = starts[row : row + ROWS_PER_CHUNK + 1]
            part = slice(own[0], own[-1])
            kept[part] &= _among_largest(ranked[part], own - own[0], k)
        return subset(codes, torch.from_numpy(kept))

    def explain(
        self,
        x: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_in"],
        weights: tuple[Tensor, Tensor, Tensor],
        *,
        k: int,
    ) -> Explanation:
        """Explain a residual by the k largest entries of each row of x W_encᵀ + b_enc, whatever their sign."""
        if self.bf16 or k > DENSE_EXPLANATION * len(weights[0]):
            return super().explain(x, residual, weights, k=k)
        return explain_sparsely(x, residual, weights, k=k, kernels=self)

    def among_largest(self, pre: Float[Tensor, "chunk d_sae"], k: int) -> Float[Tensor, "chunk d_sae"]:
        """Return 1 for the k largest entries of each row, else 0; ties go to the lower feature, in bf16 all share."""
        place = pre.shape[1] - k
        if place <= 0:
            return torch.ones_like(pre)
        if pre.dtype == torch.bfloat16:
            bits = _ordered(pre).numpy()
            return torch.from_numpy(bits >= np.partition(bits, place, axis=1)[:, place, None]).to(pre.dtype)
        whole = pre.numpy()
        below = whole < np.partition(whole, place, axis=1)[:, place, None]
        if np.count_nonzero(below) < place * len(pre):  # ties at the last place
            return super().among_largest(pre, k)
        return torch.from_numpy(np.logical_not(below, out=below).astype(whole.dtype))

    def above(self, pre: Float[Tensor, "chunk d_sae"], threshold: Float[Tensor, "..."]) -> SparseCodes:
        """Return the entries strictly above a threshold, and NaN; cheap where they are few. Of bf16, without values."""
        if pre.dtype == torch.bfloat16:
            # positive floats are ordered as their bits are; cut off, those of a limit are the largest not above it
            pre, threshold = pre.view(torch.int16), (threshold.float().view(torch.int32) >> 16).short()
        whole, limits = pre.numpy(), threshold.detach().numpy()
        # of a stack, limits are [members, 1, ...]
        shaped = whole.reshape(len(limits), -1, whole.shape[1]) if limits.ndim == STACKED else whole
        within = shaped <= limits
        return _codes(whole, np.flatnonzero(np.logical_not(within, out=within)))

    def by_feature(
        self, codes: SparseCodes, d_sae: int
    ) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "d_sae_plus_1"]]:
        """Return the codes' places by feature, then row; their rows in that order; where each feature starts."""
        places = np.arange(len(codes.features), dtype=np.int32)
        matrix = csr_array(
            (places, codes.features.numpy(), codes.offsets.numpy()), shape=(codes.rows, d_sae)
        ).tocsc()
        order, rows, starts = (torch.from_numpy(a) for a in (matrix.data, matrix.indices, matrix.indptr))
        return order, rows, starts

    def _select_largest(self, x: Tensor, W: Tensor, b: Tensor, k: int, *, lowest: float) -> SparseCodes:
        if self.bf16 and not _finite(x, W, b):
            return CpuKernels(members=self.members)._select_largest(x, W, b, k, lowest=lowest)
        return super()._select_largest(x, W, b, k, lowest=lowest)

    def _select_above(self, x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> SparseCodes:
        if self.bf16 and not _finite(x, W, b, threshold):
            return CpuKernels(members=self.members)._select_above(x, W, b, threshold)
        return super()._select_above(x, W, b, threshold)


def _candidates(pre: Float[Tensor, "chunk d_sae"], k: int, lowest: float) -> SparseCodes:
    """Return, without values, the entries of a bf16 product that reach the k-th largest tile maximum of their row.

    That are at least the k largest, but for those that do not exceed `lowest`. A tile is every n-th column.
    """
    bits = pre.view(torch.int16) if lowest == 0 else _ordered(pre)
    tile = next((n for n in (32, 16, 8, 4) if pre.shape[1] % n == 0 and pre.shape[1] >= TILES * k * n), 1)
    maxima = bits.view(len(pre), tile, -1).amax(1).numpy()
    bound = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k, None]
    if lowest == 0:
        bound = np.maximum(bound, 1)
    whole = bits.numpy()
    return _codes(whole, np.flatnonzero(whole >= bound))


def _ordered(pre: Float[Tensor, "*_shape"]) -> Int16[Tensor, "*_shape"]:
    """Return integers in the order of bf16 numbers: their bits, reversed where negative."""
    bits = pre.view(torch.int16)
    return bits ^ ((bits >> 15) & 0x7FFF)


def _finite(*tensors: Tensor) -> bool:
    """Whether no number is infinite or NaN, nor so large that their sum is."""
    return all(bool(torch.isfinite(t.sum())) for t in tensors)


def _in_tiles(whole: Array, maxima: Array, bound: Array) -> Array:
    """Return the places of `whole` that reach their row's bound, looking into tiles that do so only."""
    tiles = np.flatnonzero(maxima >= bound)
    inside = np.flatnonzero(whole.reshape(-1, TILE)[tiles] >= bound[tiles // maxima.shape[1]])
    places: Array = tiles[inside // TILE] * TILE + inside % TILE
    return places


def _among_largest(values: Array, starts: Array, k: int) -> Array:
    """Return which values are among the k largest of their row; ties go to the earlier."""
    counts = np.diff(starts)
    if counts.max() <= k:
        return np.ones(len(values), bool)
    rows = np.repeat(np.arange(len(counts)), counts)
    padded = np.full((len(counts), counts.max()), -np.inf, dtype=values.dtype)
    padded[rows, np.arange(len(values)) - starts[rows]] = values
    smallest = np.partition(padded, padded.shape[1] - k, axis=1)[:, padded.shape[1] - k][rows]
    kept = values >= smallest
    if np.bincount(rows[kept]).max() > k:
        tied = values == smallest
        before = np.cumsum(tied) - tied
        free = k - np.bincount(rows[values > smallest], minlength=len(counts))
        first = np.append(before, 0)[starts[:-1]]
        kept &= ~tied | (before - first[rows] < free[rows])
    return kept


def _starts(places: Array, whole: Array) -> Array:
    starts: Array = np.searchsorted(places, np.arange(len(whole) + 1) * whole.shape[1])
    return starts


def _codes(whole: Array, places: Array) -> SparseCodes:
    """Return the entries of `whole` at ascending places."""
    starts = _starts(places, whole)
    rows = np.repeat(np.arange(len(whole)), np.diff(starts))
    features = places - rows * whole.shape[1]
    return SparseCodes(*(torch.from_numpy(a) for a in (whole.ravel()[places], features, starts)))
