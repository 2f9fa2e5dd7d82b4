"""Kernels of a dictionary whose features, or whose batch's rows, are spread over processes.

Each rank computes with the features that it holds; what goes over the network is proportional to the batch
times k + d_in, never to the dictionary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes, offsets_of
from sae.world import World

from . import Kernels
from .explanation import Explanation, explain_sparsely

SAMPLE_ROWS = 32
"""Rows of the global batch from which its threshold is guessed; costs time only, never exactness."""

RADIX_BITS = 11
"""Bits of a value that one round of the search for a threshold settles; a round sends 2^11 counts."""


class ShardedKernels:
    """The kernels of one process, made exact over all ranks of a world. See `Kernels` for the contract.

    W and b are the rank's own rows, features are counted from its first, and x is the same along `feature`; along
    `data` every rank has as many rows.
    Ties go to the lower feature of the whole dictionary, over a batch to the lower row of the global batch
    first. Every rank calls every collective, whatever its own values.

    Parameters
    ----------
    inner
        What each rank computes with.
    world
        Who else computes.
    """

    def __init__(self, inner: Kernels, world: World) -> None:
        self.inner, self.world = inner, world

    def select_rows(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
    ) -> SparseCodes:
        """Keep the k largest positive entries of each row over all shards.

        Shards exchange the values of their own k largest; the k-th of all is the threshold.
        """
        return self._compete(self.inner.select_rows(x, W, b, k=k), k, min(k, len(W)))

    def select_largest(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
    ) -> SparseCodes:
        """Keep the k largest entries of each row over all shards, which may differ in size here."""
        widest = self.world.all_reduce(torch.tensor(len(W), device=x.device), "max", axis="feature")
        return self._compete(self.inner.select_largest(x, W, b, k=k), k, min(k, int(widest)))

    def select_batch(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
    ) -> SparseCodes:
        """Keep the k · rows largest positive entries over the rows and the features of all ranks.

        All ranks collect what exceeds one guess, made from rows of all of them, and cut what is too much at the
        threshold that `kth_largest` finds; if that is too little, a lower guess follows.
        """
        world = self.world
        total = min(k, len(W) * world.axes["feature"]) * len(x) * world.axes["data"]
        wanted = 1.5 * k
        while True:
            guess = self._guess(x, W, b, wanted)
            codes = self.inner.select_above(x, W, b, threshold=guess)
            found = kth_largest(codes.values, total, world=world)
            if found is not None:
                return self._cut(codes, total, found)
            if float(guess) == 0:
                return codes
            wanted *= 4

    def select_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Keep the rank's own entries above a threshold >= 0."""
        return self.inner.select_above(x, W, b, threshold=threshold)

    def decode(self, codes: SparseCodes, W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return Z W, summed over the shards."""
        return self.world.all_reduce(self.inner.decode(codes, W), axis="feature")

    def value_gradients(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "nnz"]:
        """Return g[row] · W[feature] for every code of the rank."""
        return self.inner.value_gradients(codes, g, W)

    def weight_gradient(
        self, codes: SparseCodes, g: Float[Tensor, "batch d_in"], d_sae: int
    ) -> Float[Tensor, "d_sae d_in"]:
        """Return Zᵀ g for the rank's features, over its rows."""
        return self.inner.weight_gradient(codes, g, d_sae)

    def explain(
        self,
        x: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_in"],
        weights: tuple[Tensor, Tensor, Tensor],
        *,
        k: int,
    ) -> Explanation:
        """Explain a residual by the k largest entries of each row over all shards."""
        return explain_sparsely(x, residual, weights, k=k, kernels=self)

    def _compete(self, codes: SparseCodes, k: int, width: int) -> SparseCodes:
        """Keep the k largest codes of each row over all shards, none of which has more than `width`."""
        own, features = _padded(codes, width)
        everywhere = self.world.stack(own, axis="feature")
        together = everywhere.transpose(0, 1).flatten(1)
        # at least k places are compared, else all there is stays
        smallest = together.topk(min(k, together.shape[1]), dim=1).values[:, -1:]
        free = k - (together > smallest).sum(1, keepdim=True)
        before = everywhere[: self.world.coordinate("feature")] == smallest
        tied = own == smallest
        place = tied.cumsum(1) + before.sum(dim=(0, 2))[:, None]
        kept = (own > smallest) | (tied & (own > -torch.inf) & (place <= free)) | own.isnan()
        return SparseCodes(own[kept], features[kept], offsets_of(kept.sum(1)))

    def _guess(self, x: Tensor, W: Tensor, b: Tensor, wanted: float) -> Float[Tensor, ""]:
        """Return what about `wanted` entries per row exceed, judged by a sample; the same on all ranks."""
        rows = max(1, SAMPLE_ROWS // self.world.axes["data"])
        sample = torch.addmm(b, x[:: max(1, len(x) // rows)][:rows], W.T).clamp(min=0).flatten().nan_to_num()
        most = min(math.ceil(wanted * rows), rows * len(W))
        largest = sample.new_zeros(most)
        found = sample.topk(min(most, len(sample))).values
        largest[: len(found)] = found
        together = self.world.stack(largest).flatten()
        rank = math.ceil(wanted * rows * self.world.axes["data"])
        return together.topk(rank).values[-1] if rank < len(together) else together.new_zeros(())

    def _cut(self, codes: SparseCodes, total: int, found: KthLargest) -> SparseCodes:
        """Keep the `total` largest codes of all ranks, of which the smallest was found."""
        smallest, above, equal = found
        kept = ~(codes.values <= smallest)
        tied = codes.values == smallest
        free = total - above
        # whether ties are cut is known to all ranks alike
        kept |= tied if equal <= free else tied & (self._tie_places(codes, tied) < free)
        counts = codes.row_ids()[kept].bincount(minlength=codes.rows)
        return SparseCodes(codes.values[kept], codes.features[kept], offsets_of(counts))

    def _tie_places(self, codes: SparseCodes, tied: Tensor) -> Int[Tensor, "nnz"]:
        """Return how many ties of the global batch come before each: of lower rows, then lower features."""
        world, rows = self.world, codes.row_ids()
        shards = world.stack(rows[tied].bincount(minlength=codes.rows), axis="feature")
        by_row = shards.sum(0)
        before_rows = world.stack(by_row.sum(), axis="data")[: world.coordinate("data")].sum()
        before_row = before_rows + by_row.cumsum(0) - by_row
        before_shard = shards[: world.coordinate("feature")].sum(0)
        so_far = tied.cumsum(0) - tied.long()
        first = torch.cat([so_far, so_far.new_zeros(1)])[codes.offsets[:-1]]
        return (before_row + before_shard - first)[rows] + so_far


def sharded(kernels: Kernels, world: World) -> Kernels:
    """Return kernels that are exact over the ranks of a world; those of one process are so already."""
    return kernels if world.size == 1 else ShardedKernels(kernels, world)


class KthLargest(NamedTuple):
    """A value among those of all ranks: how many exceed it, and how many equal it."""

    value: Float[Tensor, ""]
    above: int
    equal: int


def kth_largest(values: Float[Tensor, "nnz"], k: int, *, world: World) -> KthLargest | None:
    """Return the k-th largest of the positive values of all ranks; None if there are fewer.

    Positive floats are ordered as their bits are, so the bits are settled from the highest on, eleven at a
    time, each time by one count over all ranks: exact, with the same brackets everywhere, and the traffic
    depends on no size. NaN counts as the largest.

    Parameters
    ----------
    values
        Of this rank; NaN or positive.
    k
        At least 1.
    world
        Who else computes.
    """
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype]
    bits = values.abs().view(integer)
    left = 8 * values.element_size() - 1
    prefix, above, equal = 0, 0, 0
    while left:
        width = min(RADIX_BITS, left)
        left -= width
        inside = bits[(bits >> (left + width)) == prefix]
        counts = ((inside >> left) & ((1 << width) - 1)).long().bincount(minlength=1 << width)
        from_top = world.all_reduce(counts).flip(0).cumsum(0)
        # only in the first round, which counts all
        if above + int(from_top[-1]) < k:
            return None
        place = int((above + from_top < k).sum())
        above += int(from_top[place - 1]) if place else 0
        equal = int(from_top[place]) - (int(from_top[place - 1]) if place else 0)
        prefix = (prefix << width) | ((1 << width) - 1 - place)
    value = torch.tensor(prefix, dtype=integer, device=values.device).view(values.dtype)
    return KthLargest(value, above, equal)


def _padded(
    codes: SparseCodes, width: int
) -> tuple[Float[Tensor, "batch width"], Int[Tensor, "batch width"]]:
    """Return values and features by row, -inf where a row has fewer than `width` codes."""
    rows = codes.row_ids()
    place = torch.arange(len(rows), device=rows.device) - codes.offsets[rows] + rows * width
    values = codes.values.new_full((codes.rows * width,), -torch.inf).scatter(0, place, codes.values)
    features = codes.features.new_zeros(codes.rows * width).scatter(0, place, codes.features)
    return values.view(codes.rows, width), features.view(codes.rows, width)
