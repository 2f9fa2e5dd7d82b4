"""Products with sparse codes in torch operators for any device: what is proportional to k, and no `[batch * k, d_in]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes, offsets_of

ROWS_PER_CHUNK = 512
"""Rows of pre-activations held at once: 256 to 512 ran fastest from d_sae = 2048 to 24576 (AVX2)."""

CHUNK_ENTRIES = 2**24
"""Pre-activations held at once at most (64 MiB in fp32), whatever d_sae."""

DENSE = 1 / 5
"""Share of all pairs from which on the dense product is cheaper than single dot products."""


class SparseProducts:
    """Decoding and the gradients of it. See `Kernels` for the contract."""

    def decode(self, codes: SparseCodes, W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return Z W for the codes Z."""
        return bags(codes.features, codes.offsets, codes.values, W)

    def value_gradients(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "nnz"]:
        """Return g[row] · W[feature] for every code: the gradient of Z W with respect to the values of Z."""
        if len(codes.features) == 0:
            return g.new_zeros(0)
        if len(codes.features) > DENSE * codes.rows * len(W):
            return self.dense_dots(codes, g, W)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
        result: Tensor = dots(g.contiguous(), W, codes.features, codes.offsets[:-1], codes.row_ids(), 0, -1)
        return result

    def weight_gradient(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], d_sae: int
    ) -> Float[Tensor, "d_sae d_in"]:
        """Return Zᵀ g: the gradient of Z W with respect to W, summed by feature in order of rows."""
        order, rows, starts = self.by_feature(codes, d_sae)
        return bags(rows, starts, codes.values.index_select(0, order), g)

    def by_feature(
        self, codes: SparseCodes, d_sae: int
    ) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "d_sae_plus_1"]]:
        """Return the codes' places by feature, then row; their rows in that order; where each feature starts."""
        order = codes.features.int().argsort(stable=True)
        return order, codes.row_ids()[order], offsets_of(codes.features.bincount(minlength=d_sae))

    def dense_dots(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "nnz"]:
        """Return g[row] · W[feature] out of the whole products of some rows at a time."""
        places = codes.row_ids() * len(W) + codes.features
        parts, chunk = [], max(1, min(ROWS_PER_CHUNK, CHUNK_ENTRIES // len(W)))
        for start in range(0, codes.rows, chunk):
            first, last = codes.offsets[[start, min(start + chunk, codes.rows)]].tolist()
            product = g[start : start + chunk] @ W.T
            parts.append(product.flatten().index_select(0, places[first:last] - start * len(W)))
        return torch.cat(parts)


_weighted_sum: Callable[..., Tensor] = partial(F.embedding_bag, mode="sum", include_last_offset=True)


def bags(
    members: Int[Tensor, "nnz"],
    starts: Int[Tensor, "bags_plus_1"],
    weights: Float[Tensor, "nnz"],
    rows: Float[Tensor, "n d_in"],
) -> Float[Tensor, "bags d_in"]:
    """Return for each bag the weighted sum of its members' rows."""
    if len(members) == 0:
        return rows.new_zeros(len(starts) - 1, rows.shape[1])
    return _weighted_sum(members, rows, starts, per_sample_weights=weights)
