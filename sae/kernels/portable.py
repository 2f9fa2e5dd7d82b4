"""Kernels in torch operators for any device: row chunks keep pre-activations small, the rest is sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes, concatenate, offsets_of, split, subset

from . import EachK
from .explanation import Explanation, explain_densely
from .sparse import CHUNK_ENTRIES, ROWS_PER_CHUNK, SparseProducts

SAMPLE_ROWS = 32
"""Rows from which the batch selection guesses its threshold; the guess costs time only, never exactness."""

SPARE = 16
"""Entries beyond k that a bf16 product proposes: where it rounds its result, most rows tie at the k-th."""

ROUNDING = 2.0**-6
"""How far below a threshold, relative to it, a bf16 product still proposes an entry."""

STACKED = 3
"""Dimensions of a threshold that differs between the members of a stack."""


class PortableKernels(SparseProducts):
    """Training kernels: no `[batch, d_sae]`, no `[batch * k, d_in]`. See `Kernels` for the contract.

    Parameters
    ----------
    bf16
        Whether a product in bf16 proposes the candidates. Their values are computed in the precision of W
        either way, so rounding decides at most which features compete for the last places.
    members
        How many dictionaries of one shape lie end to end: rows as well as features are those of the first, then
        those of the second and so on, and a row selects among its own dictionary's.
    """

    def __init__(self, *, bf16: bool = False, members: int = 1) -> None:
        self.bf16, self.members = bf16, members

    def select_rows(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k largest positive entries of each row of x Wᵀ + b."""
        return self._by_k(lambda alike, x, W, b, k: alike._select_largest(x, W, b, k, lowest=0.0), x, W, b, k)

    def select_largest(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: int,
    ) -> SparseCodes:
        """Keep the k largest entries of each row of x Wᵀ + b, whatever their sign."""
        return self._select_largest(x, W, b, k, lowest=-torch.inf)

    def select_batch(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        k: EachK,
    ) -> SparseCodes:
        """Keep the k · rows largest positive entries of x Wᵀ + b, over all rows together.

        Entries above a guessed threshold are collected; if they turn out too few, a lower guess follows.
        """
        return self._by_k(lambda alike, x, W, b, k: alike._select_batch(x, W, b, k), x, W, b, k)

    def select_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        *,
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Keep the entries of x Wᵀ + b strictly above a threshold >= 0: one for all or one per feature."""
        stacked = self.members > 1 and threshold.ndim == 1
        return self._select_above(x, W, b, threshold.view(self.members, 1, -1) if stacked else threshold)

    def explain(
        self,
        x: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_in"],
        weights: tuple[Tensor, Tensor, Tensor],
        *,
        k: int,
    ) -> Explanation:
        """Explain a residual by the k largest entries of each row of x W_encᵀ + b_enc, whatever their sign."""
        kept = partial(self.among_largest, k=k)
        return explain_densely(x, residual, weights, kept=kept, bf16=self.bf16)

    def leading(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        k: int,
        lowest: float,
    ) -> SparseCodes:
        """Return the k largest entries of each row that exceed `lowest`, by a product that may be in bf16."""
        return self._numbered([self.largest(pre, k, lowest) for pre, _ in self.products(x, W, b)], len(W))

    def propose(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        k: int,
        lowest: float,
    ) -> SparseCodes:
        """Return the k largest entries of each row of a product in bf16, also those that do not exceed `lowest`."""
        return self.leading(x, W, b, k, -torch.inf)

    def best(self, codes: SparseCodes, k: int, lowest: float) -> SparseCodes:
        """Return the k largest of each row's candidates that exceed `lowest`; ties go to the lower feature."""
        chosen = self.largest(codes.values.view(codes.rows, -1), k, lowest)
        features = codes.features.view(codes.rows, -1)[chosen.row_ids(), chosen.features]
        return SparseCodes(chosen.values, features, chosen.offsets)

    def exceeding(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "d_sae d_in"],
        b: Float[Tensor, "d_sae"],
        threshold: Float[Tensor, "..."],
    ) -> SparseCodes:
        """Return the entries strictly above a threshold, by a product that may be in bf16.

        Of a stack it is one for all, or [members, 1, 1 or features of a member].
        """
        found = []
        for pre, members in self.products(x, W, b):
            found.append(self.above(pre, threshold if threshold.ndim < STACKED else threshold[members]))
        return self._numbered(found, len(W))

    def products(
        self, x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b: Float[Tensor, "d_sae"]
    ) -> Iterator[tuple[Float[Tensor, "chunk width"], slice]]:
        """Yield x Wᵀ + b in row chunks, in bf16 where that proposes; each shares its memory with the next.

        Beside each stands whose rows these are: of one member, or of several with as many rows of each.
        """
        if self.bf16:
            x, W, b = x.bfloat16(), W.bfloat16(), b.bfloat16()
        width, own = len(W) // self.members, len(x) // self.members
        rows = max(1, min(ROWS_PER_CHUNK, CHUNK_ENTRIES // max(1, width)))
        if self.members > 1 and (own <= rows or x.is_cuda):
            yield from self._products_of_members(x, W, b, rows)
            return
        buffer = x.new_empty(min(rows, own), width)
        for m in range(self.members):
            W_m, b_m = W[m * width :][:width], b[m * width :][:width]
            for start in range(m * own, (m + 1) * own, rows):
                chunk = x[start : min(start + rows, (m + 1) * own)]
                yield torch.addmm(b_m, chunk, W_m.T, out=buffer[: len(chunk)]), slice(m, m + 1)

    def _products_of_members(
        self, x: Tensor, W: Tensor, b: Tensor, rows: int
    ) -> Iterator[tuple[Float[Tensor, "chunk width"], slice]]:
        """Yield the products of as many members at once as so many rows hold; on a GPU, as many as fit a chunk."""
        x, W, b = (part.view(self.members, -1, part.shape[-1]) for part in (x, W, b.view(self.members, -1)))
        own, width = x.shape[1], W.shape[1]
        fit = CHUNK_ENTRIES // (own * width) if x.is_cuda else rows // own
        buffer = x.new_empty(min(self.members, max(1, fit)), own, width)
        for m in range(0, self.members, len(buffer)):
            these = slice(m, min(m + len(buffer), self.members))
            pre = buffer[: these.stop - m]
            if x.is_cuda:
                torch.baddbmm(b[these], x[these], W[these].mT, out=pre)
            else:
                # no slower than a batched product, and the bits that a member has alone where memory is aligned
                for x_m, W_m, b_m, out in zip(x[these], W[these], b[these], pre, strict=True):
                    torch.addmm(b_m, x_m, W_m.T, out=out)
            yield pre.view(-1, width), these

    def largest(self, pre: Float[Tensor, "chunk d_sae"], k: int, lowest: float) -> SparseCodes:
        """Return the k largest entries of each row that exceed `lowest`; ties go to the lower feature."""
        values, features = pre.topk(min(k + 1, pre.shape[1]))
        if k < pre.shape[1]:
            # topk breaks ties as it likes; one entry more shows whether the k-th had a rival
            tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > lowest)
            values, features = values[:, :k], features[:, :k]
            if tied.any():
                features = features.contiguous()
                features[tied] = pre[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        features = features.sort(dim=1).values
        values = pre.gather(1, features)
        kept = ~(values <= lowest)
        return SparseCodes(values[kept], features[kept], offsets_of(kept.sum(1)))

    def among_largest(self, pre: Float[Tensor, "chunk d_sae"], k: int) -> Float[Tensor, "chunk d_sae"]:
        """Return 1 for the k largest entries of each row, else 0; ties go to the lower feature, in bf16 all share."""
        if k >= pre.shape[1]:
            return torch.ones_like(pre)
        kept = ~(pre < pre.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True))
        # rounded as in bf16, most rows tie
        if pre.dtype != torch.bfloat16 and int(kept.sum()) > k * len(pre):
            best = pre.argsort(dim=1, descending=True, stable=True)[:, :k]
            return torch.zeros_like(pre).scatter_(1, best, 1.0)
        return kept.to(pre.dtype)

    def above(self, pre: Float[Tensor, "chunk d_sae"], threshold: Float[Tensor, "..."]) -> SparseCodes:
        """Return the entries strictly above a threshold, and NaN; cheap where they are few."""
        shape = (len(threshold), -1, pre.shape[1]) if threshold.ndim == STACKED else pre.shape
        rows, features = (~(pre.view(shape) <= threshold)).view_as(pre).nonzero(as_tuple=True)
        return SparseCodes(pre[rows, features], features, offsets_of(rows.bincount(minlength=len(pre))))

    def _select_largest(self, x: Tensor, W: Tensor, b: Tensor, k: int, *, lowest: float) -> SparseCodes:
        if len(W) == 0:
            return _empty(x)
        width = len(W) // self.members
        k = min(k, width)
        if not self.bf16:
            return self.leading(x, W, b, k, lowest)
        found = self.propose(x, W, b, min(k + SPARE, width), lowest)
        return self.best(self._exact(found, x, W, b), k, lowest)

    def _by_k(
        self,
        rule: Callable[[PortableKernels, Tensor, Tensor, Tensor, int], SparseCodes],
        x: Tensor,
        W: Tensor,
        b: Tensor,
        k: EachK,
    ) -> SparseCodes:
        """Select by a rule: neighbours in a stack with one k by one call, in chunks that fit a cache."""
        if isinstance(k, int):
            return rule(self, x, W, b, k)
        rows, width = len(x) // self.members, len(W) // self.members
        first, found = 0, list[SparseCodes]()
        for own, alike in groupby(k):
            last = first + len(list(alike))
            features = slice(first * width, last * width)
            kernels = type(self)(bf16=self.bf16, members=last - first)
            codes = rule(kernels, x[first * rows : last * rows], W[features], b[features], own)
            found.append(codes._replace(features=codes.features + features.start) if first else codes)
            first = last
        return concatenate(found)

    def _select_batch(self, x: Tensor, W: Tensor, b: Tensor, k: int) -> SparseCodes:
        rows, width = len(x) // self.members, len(W) // self.members
        total = min(k, width) * rows
        few = x.view(self.members, rows, -1)[:, :: max(1, rows // SAMPLE_ROWS)][:, :SAMPLE_ROWS]
        sample = torch.cat(
            [
                torch.addmm(b_m, x_m, W_m.T).view(1, -1)
                for x_m, W_m, b_m in zip(few, W.chunk(self.members), b.chunk(self.members), strict=True)
            ]
        )
        wanted = 1.5 * k * few.shape[1]
        while True:
            rank = int(min(wanted, sample.shape[1]))
            whole = rank == sample.shape[1]
            guess = sample.new_zeros(self.members) if whole else sample.topk(rank).values[:, -1]
            guess = guess.nan_to_num().clamp(min=0)
            codes = self._select_above(x, W, b, guess.view(-1, 1, 1) if self.members > 1 else guess[0])
            counts = codes.offsets[::rows].diff()
            if bool(((counts >= total) | (guess == 0)).all()):
                return concatenate([cut(part, total) for part in split(codes, self.members)])
            wanted *= 4

    def _select_above(self, x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> SparseCodes:
        if len(W) == 0:
            return _empty(x)
        if not self.bf16:
            return self.exceeding(x, W, b, threshold)
        exact = self._exact(self.exceeding(x, W, b, threshold * (1 - ROUNDING)), x, W, b)
        limits = threshold
        if threshold.ndim:
            each = len(W) // self.members if threshold.numel() < len(W) else 1
            limits = threshold.flatten()[exact.features // each]
        return subset(exact, ~(exact.values <= limits))

    def _numbered(self, parts: Sequence[SparseCodes], d_sae: int) -> SparseCodes:
        """Return the codes of consecutive chunks as one, with features numbered through all members."""
        codes = concatenate(parts)
        if self.members == 1:
            return codes
        counts = codes.offsets[:: codes.rows // self.members].diff()
        firsts = torch.arange(0, d_sae, d_sae // self.members, device=counts.device)
        own = firsts.repeat_interleave(counts, output_size=len(codes.features))
        return codes._replace(features=codes.features + own)

    def _exact(self, codes: SparseCodes, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """Return x Wᵀ + b in full precision at the codes' places."""
        return codes._replace(values=self.value_gradients(codes, x, W) + b[codes.features])


def cut(codes: SparseCodes, total: int) -> SparseCodes:
    """Keep the `total` largest codes; ties go to the lower row, then feature."""
    values = codes.values
    if len(values) <= total:
        return codes
    place = len(values) - total
    # kthvalue has no deterministic form on a GPU, where sorting is quick
    smallest = values.sort().values[place] if values.is_cuda else values.kthvalue(place + 1).values
    kept = ~(values <= smallest)
    ties = (values == smallest).nonzero().squeeze(1)[: total - int(kept.sum())]
    kept[ties] = True
    return subset(codes, kept)


def _empty(x: Tensor) -> SparseCodes:
    """Return the codes of a dictionary without features."""
    return SparseCodes(
        x.new_zeros(0), x.new_zeros(0, dtype=torch.int64), x.new_zeros(len(x) + 1, dtype=torch.int64)
    )
