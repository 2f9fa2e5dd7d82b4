"""Training losses as pure functions; each rank returns its rows' share, and the shares along `data` add up."""

from __future__ import annotations

from collections.abc import Sequence

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
    W_enc, b_enc, W_dec, b_dec = parameters
    n_dead = world.all_reduce(dead.view(members, -1).sum(1), axis="feature").tolist()
    reviving = [m for m, n in enumerate(n_dead) if n]
    losses = [x.new_zeros(()) for _ in n_dead]
    if reviving:
        xs, x_hats, b_decs = (t.detach().chunk(members) for t in (x, x_hat, b_dec))
        residuals = [xs[m] - x_hats[m] for m in reviving]
        wholes = unexplained(residuals, [xs[m] for m in reviving], world).to(x.dtype)
        for m, residual, whole in zip(reviving, residuals, wholes, strict=True):
            chosen = dead.chunk(members)[m].nonzero().squeeze(1) + m * (len(dead) // members)
            error = explain(
                xs[m] - b_decs[m], residual, (W_enc, b_enc, W_dec), chosen=chosen, k=k_aux, kernels=kernels
            )
            losses[m] = min(n_dead[m] / k_aux, 1.0) * error / whole
    return losses[0] if members == 1 else torch.stack(losses)


def unexplained(
    residuals: Sequence[Float[Tensor, "batch d_in"]], xs: Sequence[Float[Tensor, "batch d_in"]], world: World
) -> Float64[Tensor, "members"]:
    """Return Σ|e - mean e|² over the global batch, infinite where x is rounded to as much: then all is explained.

    By one collective, however many members a stack has: the deviations of each rank's rows from their own mean, and of
    these means from that of all (Chan); a difference of sums over rows would have no digits left where the residual
    is mostly an offset.

    Parameters
    ----------
    residuals, xs
        e and x, of each member.
    world
        Who has the other rows.
    """
    own = []
    for residual, x in zip(residuals, xs, strict=True):
        mean = residual.mean(0)
        sums = torch.stack([_squares(mean.double()), _squares(residual - mean), _squares(x)])
        own.append(torch.cat([mean, sums]))
    together = world.all_reduce(torch.stack(own), axis="data")
    found = []
    for x, sums in zip(xs, together, strict=True):
        between = sums[-3] - _squares(sums[:-3]) / world.axes["data"]
        spread, rounding = sums[-2] + len(x) * between, torch.finfo(x.dtype).eps * sums[-1]
        found.append(torch.where(spread > rounding, spread, torch.inf))
    return torch.stack(found)


def _squares(x: Float[Tensor, "*_shape"]) -> Float64[Tensor, ""]:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.double().square()


def global_rows(x: Float[Tensor, "batch d_in"], world: World) -> int:
    """Return the rows of the global batch, of which all ranks have as many."""
    return len(x) * world.axes["data"]
