"""Encoding and decoding with explicit sparse gradients; architectures compose these."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .codes import SparseCodes
from .kernels import Kernels
from .kernels.explanation import Explanation

Select = Callable[[Tensor, Tensor, Tensor], SparseCodes]
"""A selection rule: centred x, W_enc, b_enc to codes."""


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, "d_sae"],
    b_dec: Float[Tensor, "members_d_in"],
    *,
    select: Select,
    kernels: Kernels,
) -> SparseCodes:
    """Return the codes that `select` keeps of (x - b_dec) W_encᵀ + b_enc.

    The gradient flows through the kept entries only, as it does for a dense product followed by a mask.
    """
    values, features, offsets = _Encode.apply(x, W_enc, b_enc, b_dec, select, kernels)  # type: ignore[no-untyped-call]
    return SparseCodes(values, features, offsets)


def decode(
    codes: SparseCodes,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, "members_d_in"] | None,
    *,
    kernels: Kernels,
) -> Float[Tensor, "batch d_in"]:
    """Return Z W_dec + b_dec for the codes Z; without b_dec the product alone."""
    product: Tensor = _Decode.apply(*codes, W_dec, kernels)  # type: ignore[no-untyped-call]
    return product if b_dec is None else shift(product, b_dec)


def shift(x: Float[Tensor, "rows d_in"], by: Float[Tensor, "members_d_in"]) -> Float[Tensor, "rows d_in"]:
    """Return x with a vector added to every row: of a stack (`sae.stack`), each member's own to its rows."""
    if len(by) == x.shape[1]:
        return x + by
    members = len(by) // x.shape[1]
    return (x.view(members, -1, x.shape[1]) + by.view(members, 1, -1)).view_as(x)


def explain(
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor],
    *,
    chosen: Int[Tensor, "n"],
    k: int,
    kernels: Kernels,
) -> Float[Tensor, ""]:
    """Return Σ|e - Z W_dec|² for a residual e, by chosen features alone.

    Z holds the k largest entries of each row of x W_encᵀ + b_enc, whatever their sign. The gradients of both
    matrices are sparse tensors, so that they cost the chosen rows only; x and e get none.

    Parameters
    ----------
    x, residual
        Centred rows, and what is to be explained of each.
    parameters
        W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_in].
    chosen
        Distinct features, ascending.
    k
        Features that share in one row.
    kernels
        What computes.
    """
    work = partial(kernels.explain, k=k)
    result: Tensor = _Explain.apply(x, residual, *parameters, chosen, work)  # type: ignore[no-untyped-call]
    return result


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, select: Select, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = shift(x, -b_dec)
        codes = select(centred, W_enc, b_enc)
        ctx.save_for_backward(centred, W_enc, codes.features, codes.offsets)
        ctx.kernels, ctx.members = kernels, len(b_dec) // x.shape[1]
        ctx.mark_non_differentiable(codes.features, codes.offsets)
        return codes.values, codes.features, codes.offsets

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc, features, offsets = ctx.saved_tensors
        g = SparseCodes(gradients[0], features, offsets)
        to_x, to_W_enc, to_b_enc, to_b_dec = ctx.needs_input_grad[:4]
        g_x = ctx.kernels.decode(g, W_enc) if to_x else None
        g_W_enc = ctx.kernels.weight_gradient(g, centred, len(W_enc)) if to_W_enc else None
        g_b_enc = (
            g.values.new_zeros(len(W_enc)).index_add_(0, features, g.values) if to_b_enc or to_b_dec else None
        )
        g_b_dec = None
        if g_b_enc is not None and to_b_dec:
            # every row's share of b_dec is -gᵢ W_enc: their sum needs one product with a vector
            parts = zip(g_b_enc.chunk(ctx.members), W_enc.chunk(ctx.members), strict=True)
            g_b_dec = -torch.cat([g_b @ W for g_b, W in parts])
        return g_x, g_W_enc, g_b_enc if to_b_enc else None, g_b_dec, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, features: Tensor, offsets: Tensor, W_dec: Tensor, kernels: Kernels
    ) -> Tensor:
        ctx.save_for_backward(values, features, offsets, W_dec)
        ctx.kernels = kernels
        return kernels.decode(SparseCodes(values, features, offsets), W_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, features, offsets, W_dec = ctx.saved_tensors
        (g,) = gradients
        codes = SparseCodes(values, features, offsets)
        to_values, _, _, to_W_dec = ctx.needs_input_grad[:4]
        g_values = ctx.kernels.value_gradients(codes, g, W_dec) if to_values else None
        g_W_dec = ctx.kernels.weight_gradient(codes, g, len(W_dec)) if to_W_dec else None
        return g_values, None, None, g_W_dec, None


class _Explain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        chosen: Tensor,
        work: Callable[..., Explanation],
    ) -> Tensor:
        weights = (
            W_enc.index_select(0, chosen),
            b_enc.index_select(0, chosen),
            W_dec.index_select(0, chosen),
        )
        found = work(x, residual, weights)
        ctx.save_for_backward(chosen, found.W_enc, found.b_enc, found.W_dec)
        ctx.shapes = W_enc.shape, b_enc.shape, W_dec.shape
        return found.error

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        chosen, *found = ctx.saved_tensors
        (g,) = gradients
        to_W_enc, to_b_enc, to_W_dec = (
            torch.sparse_coo_tensor(chosen[None], g * part, shape, check_invariants=False)
            for part, shape in zip(found, ctx.shapes, strict=True)
        )
        return None, None, to_W_enc, to_b_enc.to_dense(), to_W_dec, None, None
