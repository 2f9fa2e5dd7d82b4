"""Kernels for a GPU in Triton: selection out of the product's own tiles, sparse sums without atomics.

None of this is derived from published kernels, some of which may not be used commercially.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.codes import SparseCodes, offsets_of

from . import programs
from .portable import PortableKernels

BLOCK_ROWS, TILE, BLOCK_IN = 128, 128, 64
"""Rows, features and inputs of one step of the product: four warps' worth of tensor-core work twice over."""

FEW, MANY = 4, 8
"""Candidates kept per tile of 128 features: few where a tile holds a quarter of a code on average, else many."""

LOAD = 2
"""Codes per tile on average from which on tiles overflow too often, and the whole product is cheaper."""

BLOCK, MEMBERS = 128, 16
"""Columns and members of one step of a sparse sum: 16 rows on their way at once hide the memory's latency."""

DENSE = 1 / 20
"""Share of all pairs from which on a dense product is cheaper than gathering rows."""

DENSE_ENTRIES = 2**27
"""Entries of dense codes held at once (512 MiB in fp32)."""


class TritonKernels(PortableKernels):
    """The portable kernels with the encoder's product, its selection and all sparse sums in Triton.

    A program that computes a tile of the product keeps the few largest entries of each row of it, so the
    pre-activations are never written, only a sixteenth or a thirty-second of them. The largest entry that a
    tile did not keep is known: rows in which it could have been chosen, or in which codes tie for the last
    place, are done again by the portable kernels, so that the result is exact. Sums run in the order of rows
    and features: the same bits every time. See `Kernels` for the contract.
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
        tiles = triton.cdiv(len(W), TILE)
        if self.members > 1 or k > LOAD * tiles:
            return super().leading(x, W, b, k, lowest)
        keep = FEW if 4 * k <= tiles else MANY
        values, features, hidden = self._propose(x, W, b, x.new_zeros(()), keep)
        top, places = values.topk(min(k + 1, values.shape[1]))
        last = top[:, k - 1]
        rival = top[:, k] if top.shape[1] > k else torch.full_like(last, -torch.inf)
        again = ((hidden > lowest) & (hidden >= last)) | ((last > lowest) & (rival == last))
        chosen, order = features.gather(1, places[:, :k]).sort(dim=1)
        top = top[:, :k].gather(1, order)
        kept = ~(top <= lowest)
        codes = SparseCodes(top[kept], chosen[kept], offsets_of(kept.sum(1)))
        if not again.any():
            return codes
        return _with_rows(codes, again, super().leading(x[again], W, b, k, lowest), len(W))

    def exceeding(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Return the entries strictly above a threshold: one for all or one per feature."""
        if self.members > 1:
            return super().exceeding(x, W, b, threshold)
        values, features, hidden = self._propose(x, W, b, threshold, MANY)
        limits = threshold if threshold.ndim == 0 else threshold[features]
        rows, places = (~(values <= limits)).nonzero(as_tuple=True)
        found = features[rows, places]
        order = (rows * len(W) + found).argsort()
        counts = offsets_of(rows.bincount(minlength=len(x)))
        codes = SparseCodes(values[rows, places][order], found[order], counts)
        again = hidden > 0
        if not again.any():
            return codes
        return _with_rows(codes, again, super().exceeding(x[again], W, b, threshold), len(W))

    def decode(self, codes: SparseCodes, W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return Z W for the codes Z."""
        if _many(codes, len(W)):
            return torch.cat([dense @ W for _, dense in _dense_chunks(codes, len(W))])
        return _sums(codes.features, codes.offsets, codes.values, W)

    def value_gradients(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "nnz"]:
        """Return g[row] · W[feature] for every code: the gradient of Z W with respect to the values of Z."""
        if _many(codes, len(W)):
            return self.dense_dots(codes, g, W)
        g, W = g.contiguous(), W.contiguous()
        out = g.new_empty(len(codes.features))
        if len(out):
            programs.dots[(codes.rows,)](
                codes.features, codes.offsets, g, W, out, W.shape[1],
                BLOCK=BLOCK, MEMBERS=MEMBERS, ACCUMULATE=_accumulator(g),
            )  # fmt: skip
        return out

    def weight_gradient(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], d_sae: int
    ) -> Float[Tensor, "d_sae d_in"]:
        """Return Zᵀ g: the gradient of Z W with respect to W, summed by feature in order of rows."""
        if _many(codes, d_sae):
            total = g.new_zeros(d_sae, g.shape[1])
            for chunk, dense in _dense_chunks(codes, d_sae):
                total.addmm_(dense.T, g[chunk])
            return total
        order, rows, starts = self.by_feature(codes, d_sae)
        return _sums(rows, starts, codes.values[order], g)

    def _propose(
        self, x: Tensor, W: Tensor, b: Tensor, limits: Tensor, keep: int
    ) -> tuple[Float[Tensor, "batch candidates"], Int[Tensor, "batch candidates"], Float[Tensor, "batch"]]:
        """Return for each row its candidates, their features, and the largest excess of what is no candidate."""
        dtype = x.dtype
        if self.bf16:
            x, W = x.bfloat16(), W.bfloat16()
        if x.device.type == "cpu":  # Triton's interpreter cannot multiply bf16, but what it rounds to it can
            x, W = x.to(dtype), W.to(dtype)
        x, W = x.contiguous(), W.contiguous()
        tiles = triton.cdiv(len(W), TILE)
        values = x.new_empty(len(x), tiles, keep, dtype=dtype)
        features = torch.empty(len(x), tiles, keep, dtype=torch.int32, device=x.device)
        hidden = values.new_empty(len(x), tiles)
        programs.propose[(triton.cdiv(len(x), BLOCK_ROWS), tiles)](
            x, W, b, limits, values, features, hidden, len(x), W.shape[1], len(W), tiles,
            limits.stride(0) if limits.ndim else 0,
            BLOCK_ROWS=BLOCK_ROWS, TILE=TILE, BLOCK_IN=BLOCK_IN, KEEP=keep, ACCUMULATE=_accumulator(values),
            num_warps=8,
        )  # fmt: skip
        return values.flatten(1), features.flatten(1).long(), hidden.amax(1)


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _sums(
    members: Int[Tensor, "nnz"],
    starts: Int[Tensor, "bags_plus_1"],
    weights: Float[Tensor, "nnz"],
    table: Float[Tensor, "n d_in"],
) -> Float[Tensor, "bags d_in"]:
    """Return for each bag the weighted sum of its members' rows."""
    table = table.contiguous()
    out = table.new_empty(len(starts) - 1, table.shape[1])
    if out.numel():
        programs.weighted_sums[(len(out), triton.cdiv(table.shape[1], BLOCK))](
            members, starts, weights.contiguous(), table, out, table.shape[1],
            BLOCK=BLOCK, MEMBERS=MEMBERS, ACCUMULATE=_accumulator(table),
        )  # fmt: skip
    return out


def _many(codes: SparseCodes, d_sae: int) -> bool:
    return len(codes.features) > DENSE * codes.rows * d_sae


def _dense_chunks(codes: SparseCodes, d_sae: int) -> Iterator[tuple[slice, Float[Tensor, "chunk d_sae"]]]:
    """Yield some rows at a time, and their codes with zeros in between."""
    rows = max(1, DENSE_ENTRIES // max(1, d_sae))
    for start in range(0, codes.rows, rows):
        offsets = codes.offsets[start : start + rows + 1]
        first, last = offsets[[0, -1]].tolist()
        part = SparseCodes(codes.values[first:last], codes.features[first:last], offsets - first)
        yield slice(start, start + part.rows), part.to_dense(d_sae)


def _with_rows(
    codes: SparseCodes, again: Bool[Tensor, "batch"], redone: SparseCodes, d_sae: int
) -> SparseCodes:
    """Return the codes with those rows replaced."""
    rows = codes.row_ids()
    kept = ~again[rows]
    rows = torch.cat([rows[kept], again.nonzero().squeeze(1)[redone.row_ids()]])
    features = torch.cat([codes.features[kept], redone.features])
    values = torch.cat([codes.values[kept], redone.values])
    order = (rows * d_sae + features).argsort()
    return SparseCodes(values[order], features[order], offsets_of(rows.bincount(minlength=codes.rows)))
