"""Training losses as pure functions; each rank returns its rows' share, and the shares along `data` add up."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from .kernels import Kernels
from .operators import explain
from .world import World


def reconstruction(
    x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], *, world: World, members: int = 1
) -> Float[Tensor, "..."]:
    """Return the mean squared error Σ|x - x̂|² / (rows · d_in), rows counted over all ranks.

    Inputs scaled to mean 0 and mean square 1 make it an estimate of FVU about the data-set mean. Of a stack, each
    member's.
    """
    rows = global_rows(x, world) // members
    return by_member((x - x_hat).square(), members) / (rows * x.shape[1])


def by_member(values: Float[Tensor, "batch ..."], members: int) -> Float[Tensor, "..."]:
    """Return the sum of all values; of a stack of several, one for each member."""
    return values.sum() if members == 1 else values.view(members, -1).sum(1)


def auxk(
    x: Float[Tensor, "batch d_in"],
    x_hat: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    dead: Bool[Tensor, "d_sae"],
    k_aux: int,
    kernels: Kernels,
    world: World,
    members: int = 1,
) -> Float[Tensor, "..."]:
    """Return how badly the dead features explain what the live ones leave over.

    With e = x - x̂ and ê = Σ pre_j W_dec[j] over the k_aux dead features of largest pre-activation per row:
    min(n_dead / k_aux, 1) · Σ|e - ê|² / Σ|e - mean e|².

    Parameters
    ----------
    x, x_hat
        Inputs and the main reconstruction.
    parameters
        W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], of a stack end to end.
    dead
        This shard's features that have been silent for long; none in any shard gives 0.
    k_aux
        Dead features that share in one row; ties at the last place go to the lower feature.
    kernels
        What computes; those of all shards together, of a stack those of one.

    References
    ----------
    arXiv 2406.04093, section A.2. Deviations and choices: the residual is detached, so only dead features
    learn from it; ê has no b_dec, which x̂ contains already; pre-activations are not rectified, since a dead
    feature is mostly one with negative pre-activations and a ReLU would leave it without a gradient; b_dec
    gets no gradient; with fewer than k_aux dead features the loss shrinks in proportion.
    """
    if members > 1:
        W_enc, b_enc, W_dec, b_decs = parameters
        owner = torch.arange(len(dead), device=dead.device) // (len(dead) // members)
        shares = zip(x.chunk(members), x_hat.chunk(members), b_decs.chunk(members), strict=True)
        return torch.stack(
            [
                auxk(
                    x_m, x_hat_m, (W_enc, b_enc, W_dec, b_dec), dead=dead & (owner == m), k_aux=k_aux, kernels=kernels,
                    world=world,
                )
                for m, (x_m, x_hat_m, b_dec) in enumerate(shares)
            ]
        )  # fmt: skip
    chosen = dead.nonzero().squeeze(1)
    n_dead = int(world.all_reduce(dead.sum(), axis="feature"))
    if n_dead == 0:
        return x.new_zeros(())
    W_enc, b_enc, W_dec, b_dec = parameters
    x = x.detach()
    residual = x - x_hat.detach()
    centred, weights = x - b_dec.detach(), (W_enc, b_enc, W_dec)
    error = explain(centred, residual, weights, chosen=chosen, k=k_aux, kernels=kernels)
    return min(n_dead / k_aux, 1.0) * error / unexplained(residual, x, world).to(x.dtype)


def unexplained(
    residual: Float[Tensor, "batch d_in"], x: Float[Tensor, "batch d_in"], world: World
) -> Float64[Tensor, ""]:
    """Return Σ|e - mean e|² over the global batch, or the rounding of x where that is more: then all is explained.

    By one collective: the deviations of each rank's rows from their own mean, and of these means from that of all
    (Chan); a difference of sums over rows would have no digits left where the residual is mostly an offset.
    """
    mean = residual.mean(0)
    sums = torch.stack([_squares(mean.double()), _squares(residual - mean), _squares(x)])
    sums = world.all_reduce(torch.cat([mean, sums]), axis="data")
    between = sums[-3] - _squares(sums[:-3]) / world.axes["data"]
    return torch.maximum(sums[-2] + len(x) * between, torch.finfo(x.dtype).eps * sums[-1])


def _squares(x: Float[Tensor, "*_shape"]) -> Float64[Tensor, ""]:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.double().square()


def global_rows(x: Float[Tensor, "batch d_in"], world: World) -> int:
    """Return the rows of the global batch, of which all ranks have as many."""
    return len(x) * world.axes["data"]
