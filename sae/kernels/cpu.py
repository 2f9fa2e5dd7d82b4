"""Kernels in torch operators: row chunks keep pre-activations small, all after selection is sparse.

They run on any device that torch does; the sizes were measured on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.codes import SparseCodes, concatenate, offsets_of
from sae.world import World

ROWS_PER_CHUNK = 512
"""Rows of pre-activations held at once: 256 to 512 ran fastest from d_sae = 2048 to 24576 (AVX2)."""

CHUNK_ENTRIES = 2**24
"""Pre-activations held at once at most (64 MiB in fp32), whatever d_sae."""

SAMPLE_ROWS = 32
"""Rows from which the batch selection guesses its threshold; the guess costs time only, never exactness."""


class CpuKernels:
    """Training kernels: no `[batch, d_sae]`, no `[batch * k, d_in]`. See `Kernels` for the contract."""

    def select_rows(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
    ) -> SparseCodes:
        """Keep the k largest positive entries of each row of x Wᵀ + b."""
        parts = [_positive(*_largest(pre, min(k, len(W)))) for pre in _products(x, W, b)]
        return concatenate(parts)

    def select_batch(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
        world: World,
    ) -> SparseCodes:
        """Keep the k · rows largest positive entries of x Wᵀ + b, over the rows of all ranks together.

        Entries above a guessed threshold are collected; if they turn out too few, a lower guess follows.
        """
        counts = world.all_gather(torch.tensor(len(x), device=x.device))
        total = min(k, len(W)) * int(torch.stack(counts).sum())
        sample = torch.addmm(b, x[:: max(1, len(x) // SAMPLE_ROWS)][:SAMPLE_ROWS], W.T)
        wanted = 1.5 * k * len(sample)
        while True:
            rank = int(min(wanted, sample.numel()))
            guess = sample.flatten().topk(rank).values[-1] if rank < sample.numel() else sample.new_zeros(())
            guess = guess.nan_to_num().clamp(min=0)
            codes = self.select_above(x, W, b, threshold=guess)
            found = int(world.all_reduce(torch.tensor(len(codes.values), device=x.device)))
            lowest = float(world.all_reduce(guess, "max"))
            if found >= total or lowest == 0:
                return _cut(codes, total, world)
            wanted *= 4

    def select_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Keep the entries of x Wᵀ + b strictly above a threshold >= 0: one for all or one per feature."""
        return concatenate([_masked(pre, ~(pre <= threshold)) for pre in _products(x, W, b)])

    def decode(self, codes: SparseCodes, W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return Z W for the codes Z."""
        return _bags(codes.features, codes.offsets, codes.values, W)

    def value_gradients(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "nnz"]:
        """Return g[row] · W[feature] for every code: the gradient of Z W with respect to the values of Z."""
        if len(codes.features) == 0:
            return g.new_zeros(0)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
        result: Tensor = dots(g.contiguous(), W, codes.features, codes.offsets[:-1], codes.row_ids(), 0, -1)
        return result

    def weight_gradient(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], d_sae: int
    ) -> Float[Tensor, "d_sae d_in"]:
        """Return Zᵀ g: the gradient of Z W with respect to W, summed by feature in order of rows."""
        order = codes.features.int().argsort(stable=True)
        starts = offsets_of(codes.features.bincount(minlength=d_sae))
        return _bags(codes.row_ids()[order], starts, codes.values[order], g)


def _products(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b: Float[Tensor, "d_sae"]
) -> Iterator[Float[Tensor, "chunk d_sae"]]:
    """Yield x Wᵀ + b in row chunks; each shares its memory with the next."""
    rows = max(1, min(ROWS_PER_CHUNK, CHUNK_ENTRIES // len(W)))
    buffer = x.new_empty(min(rows, len(x)), len(W))
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows]
        yield torch.addmm(b, chunk, W.T, out=buffer[: len(chunk)])


def _largest(
    pre: Float[Tensor, "chunk d_sae"], k: int
) -> tuple[Float[Tensor, "chunk k"], Int[Tensor, "chunk k"]]:
    """Return the k largest entries of each row, features ascending, ties to the lower feature."""
    values, features = pre.topk(min(k + 1, pre.shape[1]))
    if k < pre.shape[1]:
        # topk breaks ties as it likes; one entry more shows whether the k-th had a rival
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
        values, features = values[:, :k], features[:, :k]
        if tied.any():
            features = features.contiguous()
            features[tied] = pre[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    features = features.sort(dim=1).values
    return pre.gather(1, features), features


def _positive(values: Float[Tensor, "chunk k"], features: Int[Tensor, "chunk k"]) -> SparseCodes:
    """Drop what is not positive."""
    kept = ~(values <= 0)
    if kept.all():
        offsets = torch.arange(len(values) + 1, device=values.device) * values.shape[1]
        return SparseCodes(values.flatten(), features.flatten(), offsets)
    return SparseCodes(values[kept], features[kept], offsets_of(kept.sum(1)))


def _masked(pre: Float[Tensor, "chunk d_sae"], kept: Bool[Tensor, "chunk d_sae"]) -> SparseCodes:
    """Return the kept entries; cheap where few are."""
    rows, features = kept.nonzero(as_tuple=True)
    return SparseCodes(pre[rows, features], features, offsets_of(rows.bincount(minlength=len(pre))))


def _cut(codes: SparseCodes, total: int, world: World) -> SparseCodes:
    """Keep the `total` largest codes of all ranks together; ties go to the lower rank, row, feature."""
    everywhere = world.all_gather(codes.values)
    values = torch.cat(everywhere)
    if len(values) <= total:
        return codes
    smallest = values.kthvalue(len(values) - total + 1).values
    above = int((~(values <= smallest)).sum())
    spent = sum(int((part == smallest).sum()) for part in everywhere[: world.rank])
    ties = (codes.values == smallest).nonzero().squeeze(1)[: max(0, total - above - spent)]
    kept = ~(codes.values <= smallest)
    kept[ties] = True
    counts = codes.row_ids()[kept].bincount(minlength=codes.rows)
    return SparseCodes(codes.values[kept], codes.features[kept], offsets_of(counts))


_weighted_sum = partial(F.embedding_bag, mode="sum", include_last_offset=True)


def _bags(
    members: Int[Tensor, "nnz"],
    starts: Int[Tensor, "bags_plus_1"],
    weights: Float[Tensor, "nnz"],
    rows: Float[Tensor, "n d_in"],
) -> Float[Tensor, "bags d_in"]:
    """Return for each bag the weighted sum of its members' rows."""
    result: Tensor = _weighted_sum(members, rows, starts, per_sample_weights=weights)
    return result
