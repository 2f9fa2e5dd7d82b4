"""How well some features explain a residual, and how they should change: the work of AuxK, in two ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from . import Kernels

ROWS_AT_ONCE = 512
"""Rows whose dense products are held at once; they stay in a CPU's cache."""

ROUNDED_AT_ONCE = 1024
"""The same in bf16, where adding up what each chunk gives costs more beside the products."""

ENTRIES_AT_ONCE = 2**26
"""Entries of such a product at most (256 MiB in fp32)."""


class Explanation(NamedTuple):
    """An error, and its gradients.

    Attributes
    ----------
    error : Float[Tensor, ""]
        Σ|e - Z W_dec|² for the residual e, where Z holds the k largest entries of each row of x W_encᵀ + b_enc.
    W_enc, W_dec : Float[Tensor, "n d_in"]
    b_enc : Float[Tensor, "n"]
    """

    error: Float[Tensor, ""]
    W_enc: Float[Tensor, "n d_in"]
    b_enc: Float[Tensor, "n"]
    W_dec: Float[Tensor, "n d_in"]


def explain_densely(
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    kept: Callable[[Tensor], Tensor],
    bf16: bool = False,
) -> Explanation:
    """Explain with five dense products over the features at hand, some rows at a time.

    Parameters
    ----------
    x, residual
        What is encoded, and what is to be explained.
    weights
        W_enc [n, d_in], b_enc [n], W_dec [n, d_in] of the features at hand.
    kept
        Returns 1 for the entries of some rows of x W_encᵀ + b_enc that take part, 0 for the others.
    bf16
        Whether the products read and round to bf16. What they add up to over chunks of rows stays in the precision of
        the weights.
    """
    result = Explanation(x.new_zeros(()), *(torch.zeros_like(t) for t in weights))
    W_enc, b_enc, W_dec = weights
    if bf16:
        x, residual = x.bfloat16(), residual.bfloat16()
        W_enc, b_enc, W_dec = W_enc.bfloat16(), b_enc.bfloat16(), W_dec.bfloat16()
    at_once = (ROUNDED_AT_ONCE if bf16 else ROWS_AT_ONCE) if x.device.type == "cpu" else len(x)
    rows = max(1, min(at_once, ENTRIES_AT_ONCE // len(W_enc)))
    buffer = x.new_empty(2, min(rows, len(x)), len(W_enc))
    for start in range(0, len(x), rows):
        inputs, target = x[start : start + rows], residual[start : start + rows]
        z, g = buffer[:, : len(inputs)]
        torch.addmm(b_enc, inputs, W_enc.T, out=z)
        mask = kept(z)
        difference = torch.addmm(target, z.mul_(mask), W_dec, beta=-1)
        result.error.add_(torch.linalg.vector_norm(difference, dtype=result.error.dtype).square())
        _add_product(result.W_dec, z.T, difference)
        torch.mm(difference, W_dec.T, out=g).mul_(mask)
        _add_product(result.W_enc, g.T, inputs)
        result.b_enc.add_(g.sum(0, dtype=result.b_enc.dtype), alpha=2)
    return result


def _add_product(
    total: Float[Tensor, "n d_in"], a: Float[Tensor, "n rows"], b: Float[Tensor, "rows d_in"]
) -> None:
    """Add 2 a b, in the precision of the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=2)
    else:
        total.add_(a @ b, alpha=2)


def explain_sparsely(
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    k: int,
    kernels: Kernels,
) -> Explanation:
    """Explain with sparse codes, over all shards where the kernels are those of several."""
    W_enc, b_enc, W_dec = weights
    codes = kernels.select_largest(x, W_enc, b_enc, k=k)
    difference = kernels.decode(codes, W_dec) - residual
    g = codes._replace(values=2 * kernels.value_gradients(codes, difference, W_dec))
    to_W_dec = kernels.weight_gradient(codes, difference, len(W_dec)).mul_(2)
    to_b_enc = b_enc.new_zeros(len(b_enc)).index_add_(0, codes.features, g.values)
    error = torch.linalg.vector_norm(difference).square()
    return Explanation(error, kernels.weight_gradient(g, x, len(W_enc)), to_b_enc, to_W_dec)
