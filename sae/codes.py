"""The codes of a batch: the few positive activations of each row, in compressed sparse rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SparseCodes(NamedTuple):
    """Positive codes by row: row i holds `values[offsets[i]:offsets[i + 1]]` at `features[...]`.

    Within a row features ascend and appear once. TopK is the case of (nearly) equal rows.

    Attributes
    ----------
    values : Float[Tensor, "nnz"]
        The codes, all positive.
    features : Int[Tensor, "nnz"]
        Their features, int64.
    offsets : Int[Tensor, "rows_plus_1"]
        Where each row starts, int64, from 0 to nnz.

    Examples
    --------
    >>> codes = from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    >>> codes.rows, codes.values.tolist(), codes.features.tolist(), codes.offsets.tolist()
    (2, [2.0], [1], [0, 1, 1])
    """

    values: Float[Tensor, "nnz"]
    features: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "rows_plus_1"]

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        return len(self.offsets) - 1

    def row_ids(self) -> Int[Tensor, "nnz"]:
        """Return the row of every code."""
        rows = torch.arange(self.rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=len(self.features))

    def to_dense(self, d_sae: int) -> Float[Tensor, "rows d_sae"]:
        """Return all codes, zeros included; for tests and small batches only."""
        dense = self.values.new_zeros(self.rows * d_sae)
        return dense.scatter(0, self.row_ids() * d_sae + self.features, self.values).view(self.rows, d_sae)


def from_dense(dense: Float[Tensor, "rows d_sae"]) -> SparseCodes:
    """Return the positive entries of `dense` (and NaN, so that it is noticed downstream)."""
    kept = ~(dense <= 0)
    features = kept.nonzero()[:, 1]
    return SparseCodes(dense[kept], features, offsets_of(kept.sum(1)))


def offsets_of(counts: Int[Tensor, "rows"]) -> Int[Tensor, "rows_plus_1"]:
    """Return where each row starts, given how many codes each has."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def subset(codes: SparseCodes, kept: Bool[Tensor, "nnz"]) -> SparseCodes:
    """Return the codes that are kept; differentiable."""
    entries = kept.nonzero().squeeze(1)
    counts = codes.row_ids().index_select(0, entries).bincount(minlength=codes.rows)
    return SparseCodes(
        codes.values.index_select(0, entries), codes.features.index_select(0, entries), offsets_of(counts)
    )


def sums(values: Float[Tensor, "nnz"], codes: SparseCodes, parts: int) -> Float[Tensor, "..."]:
    """Return the sum of what stands beside each code; of several consecutive batches of as many rows, one for each."""
    if parts == 1:
        return values.sum()
    counts = codes.offsets[:: codes.rows // parts].diff().tolist()
    return torch.stack([part.sum() for part in torch.split(values, counts)])


def split(codes: SparseCodes, parts: int) -> list[SparseCodes]:
    """Return the codes of so many consecutive batches of as many rows each; `concatenate` makes one of them again."""
    if parts == 1:
        return [codes]
    rows = codes.rows // parts
    ends = codes.offsets[::rows].tolist()
    return [
        SparseCodes(
            codes.values[start:end],
            codes.features[start:end],
            codes.offsets[n * rows : (n + 1) * rows + 1] - start,
        )
        for n, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def concatenate(parts: Sequence[SparseCodes]) -> SparseCodes:
    """Return the codes of consecutive batches as those of one."""
    if len(parts) == 1:
        return parts[0]
    starts = [parts[0].offsets[:1]]
    end = 0
    for part in parts:
        starts.append(part.offsets[1:] + end)
        end += len(part.features)
    return SparseCodes(
        torch.cat([p.values for p in parts]), torch.cat([p.features for p in parts]), torch.cat(starts)
    )
