"""Telling adjacent positions of an entity from others by their codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import operators
from .codes import SparseCodes, offsets_of
from .kernels import Kernels
from .world import World


def adjacent_contrast(
    codes: SparseCodes,
    follows: Bool[Tensor, "batch"],
    *,
    d_sae: int,
    pairs_at_once: int,
    temperature: float,
    kernels: Kernels,
    world: World,
) -> Float[Tensor, ""]:
    """Return how badly each row's codes pick out those of the row before, and the other way round.

    For the n pairs (a_i, b_i) of a row and the one before it, over all ranks, in blocks of at most `pairs_at_once`, with
    s_ij = cos(a_i, b_j) / temperature: the mean over i of -½ log softmax_j(s_ij)_i - ½ log softmax_j(s_ji)_i.

    Parameters
    ----------
    codes
        The rows' codes.
    follows
        Which rows continue the one before; the first row of the global batch has none.
    d_sae
        Features that the codes may hold, on this rank.
    pairs_at_once, temperature
        As above; a block is dense for as long as it is computed with, not longer.
    kernels
        What computes.
    world
        Who else computes: `data` ranks share out the blocks of the global batch, `feature` ranks add up their parts
        of s.
    """
    if world.axes["data"] > 1:
        rows = torch.stack([codes.offsets.diff(), follows.long()])
        counts, continues = world.stack(rows, axis="data").transpose(0, 1).flatten(1)
        features = torch.cat(world.all_gather(codes.features, axis="data"))
        codes = SparseCodes(world.data_gather(codes.values), features, offsets_of(counts))
        follows = continues.bool()
    rows = follows[1:].nonzero().squeeze(1) + 1
    if len(rows) == 0:
        return codes.values.new_zeros(())
    blocks = rows.tensor_split(-(-len(rows) // pairs_at_once))
    # a rank without a block takes part in the backward pass too
    loss = 0 * codes.values.sum()
    for block in blocks[world.coordinate("data") :: world.axes["data"]]:
        a, b = pick_rows(codes, block), pick_rows(codes, block - 1)
        loss = loss + checkpoint(_block_loss, a, b, d_sae, temperature, kernels, world, use_reentrant=False)
    return loss / len(rows)


def pick_rows(codes: SparseCodes, rows: Int[Tensor, "n"]) -> SparseCodes:
    """Return the codes of some rows, in their order."""
    counts = codes.offsets[rows + 1] - codes.offsets[rows]
    offsets = offsets_of(counts)
    shift = (codes.offsets[rows] - offsets[:-1]).repeat_interleave(counts)
    entries = torch.arange(len(shift), device=rows.device) + shift
    return SparseCodes(
        codes.values.index_select(0, entries), codes.features.index_select(0, entries), offsets
    )


def _block_loss(
    a: SparseCodes, b: SparseCodes, d_sae: int, temperature: float, kernels: Kernels, world: World
) -> Float[Tensor, ""]:
    columns = b.to_dense(d_sae).T.contiguous()
    products = operators.decode(a, columns, columns.new_zeros(b.rows), kernels=kernels)
    tiny = torch.finfo(products.dtype).tiny
    norms, norms_before = world.feature_sum(torch.stack([_squares(a), _squares(b)])).clamp(min=tiny).sqrt()
    scores = products / (norms[:, None] * norms_before) / temperature
    own = torch.arange(a.rows, device=scores.device)
    forth, back = (F.cross_entropy(s, own, reduction="sum") for s in (scores, scores.T))
    return (forth + back) / 2


def _squares(codes: SparseCodes) -> Float[Tensor, "rows"]:
    return codes.values.new_zeros(codes.rows).index_add(0, codes.row_ids(), codes.values.square())
