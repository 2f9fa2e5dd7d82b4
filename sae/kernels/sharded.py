"""Kernels of a dictionary whose features, or whose batch's rows, are spread over processes.

Each rank computes with the features that it holds; what goes over the network is proportional to the batch
times k + d_in, never to the dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import SparseCodes, offsets_of, subset
from sae.world import World

from . import EachK, Kernels
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
    members
        Of how many dictionaries rows and features are, a stack (`sae.stack`): as many collectives serve them all.
    """

    def __init__(self, inner: Kernels, world: World, members: int = 1) -> None:
        self.inner, self.world, self.members = inner, world, members

    def select_rows(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k largest positive entries of each row over all shards.

        Shards exchange the values of their own k largest; the k-th of all is the threshold.
        """
        codes = self.inner.select_rows(x, W, b, k=k)
        return self._compete(codes, self._each(k), len(W) // self.members)

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
        return self._compete(self.inner.select_largest(x, W, b, k=k), self._each(k), int(widest))

    def select_batch(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k · rows largest positive entries over the rows and the features of all ranks.

        All ranks collect what exceeds one guess, made from rows of all of them, and cut what is too much at the
        threshold that `kth_largest` finds; if that is too little, a lower guess follows.
        """
        world, rows, width = self.world, len(x) // self.members, len(W) // self.members
        ks = self._each(k)
        totals = ks.clamp(max=width * world.axes["feature"]) * rows * world.axes["data"]
        wanted = 1.5
        while True:
            guess = self._guess(x, W, b, [wanted * own for own in ks.tolist()])
            limit = guess.view(-1, 1, 1) if self.members > 1 else guess[0]
            codes = self.inner.select_above(x, W, b, threshold=limit)
            counts = codes.offsets[::rows].diff()
            owners = torch.arange(self.members, device=counts.device).repeat_interleave(
                counts, output_size=len(codes.features)
            )
            found = kth_largest(codes.values, owners, totals, world=world)
            if bool(((found.value != 0) | (guess == 0)).all()):
                return self._cut(codes, owners, totals, found)
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

    def _each(self, k: EachK) -> Int[Tensor, "members"]:
        """Return each member's k."""
        return torch.tensor([k] * self.members if isinstance(k, int) else k)

    def _compete(self, codes: SparseCodes, ks: Int[Tensor, "members"], widest: int) -> SparseCodes:
        """Keep the k largest codes of each row over all shards, none of which has more than k or `widest`."""
        if self.world.axes["feature"] == 1:
            return codes
        most = int(ks.max())
        own, features = _padded(codes, min(most, widest))
        k = ks.to(own.device).repeat_interleave(codes.rows // self.members)[:, None]
        everywhere = self.world.stack(own, axis="feature")
        together = everywhere.transpose(0, 1).flatten(1)
        # at least k places are compared, else all there is stays
        best = together.topk(min(most, together.shape[1]), dim=1).values
        smallest = best.gather(1, k.clamp(max=best.shape[1]) - 1)
        free = k - (together > smallest).sum(1, keepdim=True)
        before = everywhere[: self.world.coordinate("feature")] == smallest
        tied = own == smallest
        place = tied.cumsum(1) + before.sum(dim=(0, 2))[:, None]
        kept = (own > smallest) | (tied & (own > -torch.inf) & (place <= free)) | own.isnan()
        return SparseCodes(own[kept], features[kept], offsets_of(kept.sum(1)))

    def _guess(self, x: Tensor, W: Tensor, b: Tensor, wanted: Sequence[float]) -> Float[Tensor, "members"]:
        """Return what about so many entries per row of each member exceed, judged by a sample; the same on all ranks."""
        parts, ranks = self.members, self.world.size
        rows = max(1, SAMPLE_ROWS // self.world.axes["data"])
        own = x.view(parts, -1, x.shape[1])
        few = own[:, :: max(1, own.shape[1] // rows)][:, :rows]
        sample = torch.stack(
            [
                torch.addmm(b_m, x_m, W_m.T).flatten()
                for x_m, W_m, b_m in zip(few, W.chunk(parts), b.chunk(parts), strict=True)
            ]
        )
        sample = sample.clamp(min=0).nan_to_num()
        most = min(math.ceil(max(wanted) * rows), rows * len(W) // parts)
        found = sample.topk(min(most, sample.shape[1])).values
        largest = F.pad(found, (0, most - found.shape[1]))
        together = self.world.stack(largest).transpose(0, 1).flatten(1)
        places = [math.ceil(own * rows * self.world.axes["data"]) for own in wanted]
        descending = F.pad(together.topk(min(max(places), most * ranks)).values, (0, 1))
        # of no more than there are the lowest, which is 0
        at = [place - 1 if place < most * ranks else -1 for place in places]
        return descending[torch.arange(parts), at]

    def _cut(
        self,
        codes: SparseCodes,
        owners: Int[Tensor, "nnz"],
        totals: Int[Tensor, "members"],
        found: KthLargest,
    ) -> SparseCodes:
        """Keep the `totals` largest codes of all ranks, of which the smallest were found."""
        smallest = found.value[owners]
        free = totals.to(owners.device) - found.above
        kept = ~(codes.values <= smallest)
        tied = codes.values == smallest
        # whether ties are cut is known to all ranks alike
        if bool((found.equal > free).any()):
            tied &= self._tie_places(codes, tied) < free[owners]
        return subset(codes, kept | tied)

    def _tie_places(self, codes: SparseCodes, tied: Tensor) -> Int[Tensor, "nnz"]:
        """Return how many ties of the member's global batch come before each: of lower rows, then lower features."""
        world, rows = self.world, codes.row_ids()
        shards = world.stack(rows[tied].bincount(minlength=codes.rows), axis="feature")
        by_row = shards.sum(0).view(self.members, -1)
        before_rows = world.stack(by_row.sum(1), axis="data")[: world.coordinate("data")].sum(0)
        before_row = (before_rows[:, None] + by_row.cumsum(1) - by_row).flatten()
        before_shard = shards[: world.coordinate("feature")].sum(0)
        so_far = tied.cumsum(0) - tied.long()
        first = torch.cat([so_far, so_far.new_zeros(1)])[codes.offsets[:-1]]
        return (before_row + before_shard - first)[rows] + so_far


def sharded(kernels: Kernels, world: World, members: int = 1) -> Kernels:
    """Return kernels that are exact over the ranks of a world, of so many members; those of one process are so already."""
    return kernels if world.size == 1 else ShardedKernels(kernels, world, members)


class KthLargest(NamedTuple):
    """For each member a value among those of all ranks: how many exceed it, and how many equal it."""

    value: Float[Tensor, "members"]
    above: Int[Tensor, "members"]
    equal: Int[Tensor, "members"]


def kth_largest(
    values: Float[Tensor, "nnz"], owners: Int[Tensor, "nnz"], ks: Int[Tensor, "members"], *, world: World
) -> KthLargest:
    """Return the k-th largest of each member's positive values on all ranks; 0 where there are fewer.

    Positive floats are ordered as their bits are, so the bits are settled from the highest on, eleven at a
    time, each time by one count over all ranks: exact, with the same brackets everywhere, and the traffic
    depends on no number of values. NaN counts as the largest.

    Parameters
    ----------
    values
        Of this rank; NaN or positive.
    owners
        Whose each is, from 0.
    ks
        At least 1, for each member.
    world
        Who else computes.
    """
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype]
    bits = values.abs().view(integer)
    left = 8 * values.element_size() - 1
    ks = ks.to(values.device)
    prefix, above, equal = (torch.zeros_like(ks) for _ in range(3))
    while left:
        width = min(RADIX_BITS, left)
        left -= width
        inside = (bits >> (left + width)) == prefix[owners]
        cells = (owners << width) + ((bits >> left) & ((1 << width) - 1))
        counts = cells[inside].bincount(minlength=len(ks) << width).view(len(ks), -1)
        at_least = above[:, None] + F.pad(world.all_reduce(counts).flip(1).cumsum(1), (1, 0))
        # of a member with fewer than k the last, whose bits are all 0
        place = (at_least[:, 1:-1] < ks[:, None]).sum(1, keepdim=True)
        above = at_least.gather(1, place).squeeze(1)
        equal = at_least.gather(1, place + 1).squeeze(1) - above
        prefix = (prefix << width) + ((1 << width) - 1 - place.squeeze(1))
    return KthLargest(prefix.to(integer).view(values.dtype), above, equal)


def _padded(
    codes: SparseCodes, width: int
) -> tuple[Float[Tensor, "batch width"], Int[Tensor, "batch width"]]:
    """Return values and features by row, -inf where a row has fewer than `width` codes."""
    rows = codes.row_ids()
    place = torch.arange(len(rows), device=rows.device) - codes.offsets[rows] + rows * width
    values = codes.values.new_full((codes.rows * width,), -torch.inf).scatter(0, place, codes.values)
    features = codes.features.new_zeros(codes.rows * width).scatter(0, place, codes.features)
    return values.view(codes.rows, width), features.view(codes.rows, width)
