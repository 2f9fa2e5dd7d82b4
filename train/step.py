"""One step of training: from a batch to changed parameters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE, Batch, Losses
from sae.world import World

from .optim import set_rate
from .plan import Plan
from .schedule import learning_rate
from .state import TrainState


class NotFiniteError(ArithmeticError):
    """The loss is infinite or not a number; nothing was changed."""


def train_step(
    sae: SAE,
    optimiser: torch.optim.Optimizer,
    state: TrainState,
    x: Float[Tensor, "batch d_in"],
    *,
    plan: Plan,
    world: World,
) -> Losses:
    """Take one step of gradient descent on scaled rows.

    Dead features are judged before the step. The decoder's gradient is made tangent before Adam sees it, and
    its rows are brought back to unit norm after, since Adam's step is not tangent.

    Raises
    ------
    NotFiniteError
        The loss is not finite; parameters, optimiser and state are as before.
    """
    optimiser.zero_grad()
    losses = sae.losses(Batch(x), dead=state.dead(plan.dead_after_rows), world=world)
    if not torch.isfinite(losses.total.detach()):
        raise NotFiniteError(f"loss {losses.total.item()}")
    torch.autograd.backward(losses.total)
    sae.before_step()
    set_rate(optimiser, learning_rate(state.step, plan))
    optimiser.step()
    sae.after_step(losses, world=world)
    state.advance(losses.codes, world)
    return losses
