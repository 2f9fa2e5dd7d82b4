"""Kernels for a CPU: torch multiplies, compiled loops select, and scipy transposes."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from sae.codes import SparseCodes, offsets_of

from .explanation import Explanation, explain_sparsely
from .portable import STACKED, PortableKernels

TILE = 32
"""Columns of which one maximum is kept at most."""

TILES = 4
"""Tiles per candidate that a row is cut into at least; then few more entries reach their bound than are wanted."""

DENSE_EXPLANATION = 1 / 12
"""Share of the dead features from which on dense products are cheaper for AuxK; 1/20 with AVX-512."""

KEYS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Integers as wide as the numbers that are compared by their bits: products, of which those in bf16 only propose."""


class CpuKernels(PortableKernels):
    """The portable kernels with what torch does slowly on a CPU done otherwise. See `Kernels` for the contract.

    The k-th largest of a row's tile maxima is a lower bound on its k-th largest entry, which few more than k entries reach.
    What is not in fp32, such as double precision for checks of gradients, is left to the portable kernels.
    """

    def leading(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        k: int,
        lowest: float,
    ) -> SparseCodes:
        """Return the k largest entries of each row that exceed `lowest`; ties go to the lower feature."""
        if x.dtype != torch.float32:
            return super().leading(x, W, b, k, lowest)
        return self.best(self.propose(x, W, b, k, lowest), k, lowest)

    def propose(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        k: int,
        lowest: float,
    ) -> SparseCodes:
        """Return the k largest entries of each row that exceed `lowest`, or a few more; of bf16, without values."""
        if x.dtype != torch.float32:
            return super().propose(x, W, b, k, lowest)
        return self._numbered([candidates(pre, k, lowest) for pre, _ in self.products(x, W, b)], len(W))

    def best(self, codes: SparseCodes, k: int, lowest: float) -> SparseCodes:
        """Return the k largest of each row's candidates that exceed `lowest`; ties go to the lower feature."""
        values = codes.values.detach()
        if values.dtype != torch.float32:
            return super().best(codes, k, lowest)
        from . import loops

        kept = values.new_empty(codes.rows, k), codes.features.new_empty(codes.rows, k)
        counts = codes.offsets.new_empty(codes.rows)
        least = loops.LOOPS[values.element_size()].least(lowest)
        loops.best(codes.rows, k, least, codes.offsets, values, codes.features, *kept, counts)
        if bool((counts == k).all()):
            return SparseCodes(kept[0].view(-1), kept[1].view(-1), offsets_of(counts))
        present = torch.arange(k) < counts[:, None]
        return SparseCodes(kept[0][present], kept[1][present], offsets_of(counts))

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
        if k >= pre.shape[1] or pre.dtype not in KEYS:
            return super().among_largest(pre, k)
        from .loops import LOOPS

        mask, rounded = torch.empty_like(pre), pre.dtype == torch.bfloat16
        one = int(torch.ones((), dtype=pre.dtype).view(KEYS[pre.dtype]))
        LOOPS[pre.element_size()].among(*pre.shape, k, rounded, one, pre, mask)
        return mask

    def above(self, pre: Float[Tensor, "chunk d_sae"], threshold: Float[Tensor, "..."]) -> SparseCodes:
        """Return the entries strictly above a threshold, and NaN; cheap where they are few. Of bf16, without values."""
        if pre.dtype != (torch.bfloat16 if self.bf16 else torch.float32):
            return super().above(pre, threshold)
        from .loops import LOOPS

        # the sum is never the negative zero
        limits = threshold.detach().float() + 0.0
        # positive floats are ordered as their bits are; cut off, those of a limit are the largest not above it
        bits = limits.view(torch.int32) >> (32 - 8 * pre.element_size())
        every = LOOPS[pre.element_size()].least(-torch.inf)
        bounds = torch.where(limits.isnan(), every, bits + 1).to(KEYS[pre.dtype])
        sets = 0
        if threshold.ndim == STACKED:  # of a stack, [members, 1, 1 or width]
            sets = len(threshold)
            bounds = bounds.expand(sets, 1, pre.shape[1])
        elif threshold.ndim:
            sets = 1
            bounds = bounds.expand(1, pre.shape[1])
        else:
            bounds = bounds.expand(len(pre))
        return _reaching(pre, bounds.contiguous(), sets)

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


def candidates(pre: Float[Tensor, "chunk d_sae"], k: int, lowest: float) -> SparseCodes:
    """Return the k largest entries of each row that exceed `lowest`, or a few more; of bf16, without values.

    A tile is every n-th column, since neighbours tend to be large together.
    """
    from .loops import LOOPS

    rows, width = pre.shape
    tile = next((n for n in (TILE, 16, 8, 4) if width >= TILES * k * n), 1)
    bounds, counts = pre.new_empty(rows, dtype=KEYS[pre.dtype]), pre.new_empty(rows, dtype=torch.int64)
    loops = LOOPS[pre.element_size()]
    loops.propose(rows, width, -(-width // tile), k, loops.least(lowest), pre, bounds, counts)
    return _gathered(pre, bounds, 0, counts)


def _reaching(pre: Tensor, bounds: Tensor, sets: int) -> SparseCodes:
    """Return the entries whose keys reach their bounds: [sets, width] for as many rows each, or [rows] where `sets` is 0."""
    from .loops import LOOPS

    counts = pre.new_empty(len(pre), dtype=torch.int64)
    LOOPS[pre.element_size()].count(*pre.shape, sets, pre, bounds, counts)
    return _gathered(pre, bounds, sets, counts)


def _gathered(pre: Tensor, bounds: Tensor, sets: int, counts: Int[Tensor, "rows"]) -> SparseCodes:
    from .loops import LOOPS

    ends = offsets_of(counts)
    n = int(ends[-1])
    features = ends.new_empty(n)
    values = pre.new_empty(n if pre.dtype == torch.float32 else 0)
    LOOPS[pre.element_size()].gather(*pre.shape, sets, len(values), pre, bounds, ends, features, values)
    return SparseCodes(values, features, ends)
