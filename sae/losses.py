"""Training losses as pure functions; each rank returns its share, and the shares of all ranks add up."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .operators import take_rows
from .world import World


def reconstruction(
    x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], *, world: World
) -> Float[Tensor, ""]:
    """Return the mean squared error Σ|x - x̂|² / (rows · d_in), rows counted over all ranks.

    Inputs scaled to mean 0 and mean square 1 make it an estimate of FVU about the data-set mean.
    """
    return (x - x_hat).square().sum() / (global_rows(x, world) * x.shape[1])


def auxk(
    x: Float[Tensor, "batch d_in"],
    x_hat: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    dead: Bool[Tensor, "d_sae"],
    k_aux: int,
    world: World,
) -> Float[Tensor, ""]:
    """Return how badly the dead features explain what the live ones leave over.

    With e = x - x̂ and ê = Σ pre_j W_dec[j] over the k_aux dead features of largest pre-activation per row:
    min(n_dead / k_aux, 1) · Σ|e - ê|² / Σ|e - mean e|².

    Parameters
    ----------
    x, x_hat
        Inputs and the main reconstruction.
    parameters
        W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in].
    dead
        Features that have been silent for long, over all ranks; none gives 0.
    k_aux
        Dead features that share in one row; on ties at the last place all tied ones do.

    References
    ----------
    arXiv 2406.04093, section A.2. Deviations and choices: the residual is detached, so only dead features
    learn from it; ê has no b_dec, which x̂ contains already; pre-activations are not rectified, since a dead
    feature is mostly one with negative pre-activations and a ReLU would leave it without a gradient; b_dec
    gets no gradient; with fewer than k_aux dead features the loss shrinks in proportion.
    """
    chosen = dead.nonzero().squeeze(1)
    if len(chosen) == 0:
        return x.new_zeros(())
    W_enc, b_enc, W_dec, b_dec = parameters
    residual = (x - x_hat).detach()
    pre = (x - b_dec).detach() @ take_rows(W_enc, chosen).T + b_enc.index_select(0, chosen)
    if k_aux < len(chosen):
        smallest = pre.detach().topk(k_aux, dim=1).values[:, -1:]
        pre = torch.where(pre >= smallest, pre, 0)
    estimate = pre @ take_rows(W_dec, chosen)
    mean = world.all_reduce(residual.sum(0)) / global_rows(x, world)
    variance = world.all_reduce((residual - mean).square().sum())
    # a residual below the rounding of x is explained already
    variance = variance.clamp(
        min=torch.finfo(x.dtype).eps * float(world.all_reduce(x.detach().square().sum()))
    )
    return min(len(chosen) / k_aux, 1.0) * (residual - estimate).square().sum() / variance


def global_rows(x: Float[Tensor, "batch d_in"], world: World) -> int:
    """Return the rows of the batch over all ranks."""
    return int(world.all_reduce(torch.tensor(len(x), device=x.device)))
