"""JumpReLU and its step, with straight-through gradients for the thresholds."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Bandwidth = float | Float[Tensor, "nnz"]
"""Of all values, or of each."""


def jump(
    values: Float[Tensor, "nnz"], thresholds: Float[Tensor, "nnz"], *, bandwidth: Bandwidth
) -> Float[Tensor, "nnz"]:
    """Return v H(v - θ): the value where it is strictly above its threshold, else 0.

    The gradient is H(v - θ) for v, as it is almost everywhere, and -(θ / ε) K((v - θ) / ε) for θ in the place
    of a derivative that is zero almost everywhere; K is 1 on (-1/2, 1/2) and ε the bandwidth.

    References
    ----------
    arXiv 2407.14435, section 3, equation 11.
    """
    result: Tensor = _Jump.apply(values, thresholds, bandwidth)  # type: ignore[no-untyped-call]
    return result


def step(
    values: Float[Tensor, "nnz"], thresholds: Float[Tensor, "nnz"], *, bandwidth: Bandwidth
) -> Float[Tensor, "nnz"]:
    """Return H(v - θ): 1 where the value is strictly above its threshold, else 0.

    The gradient is 0 for v and -K((v - θ) / ε) / ε for θ: values do not learn from the number of active
    features, thresholds do.

    References
    ----------
    arXiv 2407.14435, section 3, equation 12.
    """
    result: Tensor = _Step.apply(values, thresholds, bandwidth)  # type: ignore[no-untyped-call]
    return result


def _inside(values: Tensor, thresholds: Tensor, bandwidth: Bandwidth) -> Tensor:
    return (values - thresholds).abs() < bandwidth / 2


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, thresholds: Tensor, bandwidth: Bandwidth) -> Tensor:
        ctx.save_for_backward(values, thresholds)
        ctx.bandwidth = bandwidth
        return torch.where(values <= thresholds, 0, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, thresholds = ctx.saved_tensors
        (g,) = gradients
        inside = _inside(values, thresholds, ctx.bandwidth)
        return (
            torch.where(values <= thresholds, 0, g),
            torch.where(inside, g * thresholds / -ctx.bandwidth, 0),
            None,
        )


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, thresholds: Tensor, bandwidth: Bandwidth) -> Tensor:
        ctx.save_for_backward(_inside(values, thresholds, bandwidth))
        ctx.bandwidth = bandwidth
        return (values > thresholds).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (inside,) = ctx.saved_tensors
        (g,) = gradients
        return None, torch.where(inside, g / -ctx.bandwidth, 0), None
