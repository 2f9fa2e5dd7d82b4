"""Nested reconstructions: each of several growing parts of the codes explains the input by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import operators
from .codes import SparseCodes, offsets_of
from .kernels import Kernels
from .losses import by_member, global_rows
from .world import World


def cut_by_feature(codes: SparseCodes, borders: Sequence[int]) -> SparseCodes:
    """Cut every row into len(borders) rows: features below borders[0], the others below borders[1], and so on.

    Values and features stay as they are, since features ascend within a row; only the offsets become finer.

    Parameters
    ----------
    codes
        Features below borders[-1].
    borders
        Ascending.

    Examples
    --------
    >>> codes = SparseCodes(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 4, 5]), torch.tensor([0, 3]))
    >>> cut_by_feature(codes, [2, 5, 9]).offsets.tolist()
    [0, 1, 2, 3]
    """
    inner = torch.tensor(borders[:-1], dtype=torch.int64, device=codes.features.device)
    groups = torch.bucketize(codes.features, inner, right=True)
    counts = (codes.row_ids() * len(borders) + groups).bincount(minlength=codes.rows * len(borders))
    return SparseCodes(codes.values, codes.features, offsets_of(counts))


def cut_by_group(codes: SparseCodes, groups: Int[Tensor, "d_sae"], parts: int) -> SparseCodes:
    """Cut every row into parts: the codes of features of group 0, those of group 1, and so on.

    Parameters
    ----------
    codes
        Of any features.
    groups
        The group of each feature, from 0 to parts - 1.
    parts
        How many there are.

    Examples
    --------
    >>> codes = SparseCodes(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2]), torch.tensor([0, 3]))
    >>> cut_by_group(codes, torch.tensor([1, 0, 1]), 2).features.tolist()
    [1, 0, 2]
    """
    return _sorted(codes, codes.row_ids() * parts + groups.index_select(0, codes.features), parts)


def cut_by_rank(codes: SparseCodes, borders: Sequence[int], *, world: World) -> SparseCodes:
    """Cut every row into len(borders) rows: its borders[0] largest codes, the next up to borders[1], and so on.

    Parameters
    ----------
    codes
        At most borders[-1] in a row; among equal ones the lower feature comes first.
    borders
        Ascending.
    world
        Who holds the rows' other features.

    Examples
    --------
    >>> codes = SparseCodes(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 4, 5]), torch.tensor([0, 3]))
    >>> cut_by_rank(codes, [1, 3], world=World()).features.tolist()
    [5, 0, 4]
    """
    rows, width = codes.row_ids(), borders[-1]
    cells = rows * width + torch.arange(len(rows), device=rows.device) - codes.offsets[rows]
    padded = codes.values.new_full((codes.rows * width,), -torch.inf).scatter_(
        0, cells, codes.values.detach()
    )
    shards = world.stack(padded.view(codes.rows, width), axis="feature")
    together = shards.transpose(0, 1).flatten(1)
    places = together.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    own = places[:, world.coordinate("feature") * width :][:, :width]
    ranks = own.flatten().gather(0, cells)
    inner = torch.tensor(borders[:-1], dtype=torch.int64, device=rows.device)
    return _sorted(codes, rows * len(borders) + torch.bucketize(ranks, inner, right=True), len(borders))


def _sorted(codes: SparseCodes, keys: Int[Tensor, "nnz"], parts: int) -> SparseCodes:
    """Return the codes with every row cut into parts, given row · parts + part of each."""
    order = keys.argsort(stable=True)
    counts = keys.bincount(minlength=codes.rows * parts)
    return SparseCodes(
        codes.values.index_select(0, order), codes.features.index_select(0, order), offsets_of(counts)
    )


def nested_errors(
    x: Float[Tensor, "batch d_in"],
    cut: SparseCodes,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, "members_d_in"],
    *,
    kernels: Kernels,
    world: World,
    members: int = 1,
    detached: bool = False,
) -> tuple[Float[Tensor, "... parts"], Float[Tensor, "batch d_in"]]:
    """Return Σ|x - x̂_m|² / (rows · d_in) for x̂_m = b_dec + Σ_{g <= m} Z_g W_dec, and the last x̂, detached.

    Rows are counted over all ranks. One sparse product serves all parts, and one pair of sparse gradients: the
    parts are rows of `cut`.

    Parameters
    ----------
    x
        The rows.
    cut
        Their codes, every row cut into the same number of parts.
    W_dec, b_dec
        The decoder.
    kernels
        What computes.
    world
        Who else computes.
    members
        Of a stack of several, errors are [members, parts].
    detached
        Whether x̂_m teaches the codes and decoder rows of part m only, as if the parts before it were constant; the
        last x̂ teaches all. Errors are the same; b_dec learns from the first and the last.
    """
    products = operators.decode(cut, W_dec, torch.zeros_like(b_dec), kernels=kernels)
    products = products.view(len(x), cut.rows // len(x), x.shape[1])
    errors, last = _NestedErrors.apply(  # type: ignore[no-untyped-call]
        operators.shift(x, -b_dec), products, members, detached
    )
    rows = global_rows(x, world) // members
    return errors / (rows * x.shape[1]), x.detach() - last


class _NestedErrors(torch.autograd.Function):
    """Squared norms of x - Σ_{g <= m} products_g, with two passes over the residuals instead of autograd's ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Tensor, members: int, detached: bool) -> tuple[Tensor, Tensor]:
        residuals = torch.empty_like(products)
        left = x
        for m in range(products.shape[1]):
            left = torch.sub(left, products[:, m], out=residuals[:, m])
        ctx.save_for_backward(residuals)
        ctx.members, ctx.detached = members, detached
        ctx.mark_non_differentiable(last := left.clone())
        errors = [by_member(left.square(), members) for left in residuals.unbind(1)]
        return torch.stack(errors, dim=-1), last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (residuals,) = ctx.saved_tensors
        own = residuals.view(ctx.members, -1, *residuals.shape[1:])
        to_products = (own * (-2 * gradients[0]).view(ctx.members, 1, -1, 1)).view_as(residuals)
        for m in reversed(range(to_products.shape[1] - 1)):
            to_products[:, m] += to_products[:, -1 if ctx.detached else m + 1]
        return -to_products[:, 0], to_products, None, None
