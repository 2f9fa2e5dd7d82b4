"""One step of training: from a batch to changed parameters."""

from __future__ import annotations

import math

import torch

from sae.base import SAE, Batch, Losses
from sae.world import World

from .optim import set_rate
from .parallel import clip_gradients_, sum_gradients_
from .plan import Plan
from .schedule import learning_rate
from .state import TrainState


class NotFiniteError(ArithmeticError):
    """The loss is infinite or not a number; nothing was changed."""


def train_step(
    sae: SAE,
    optimiser: torch.optim.Optimizer,
    state: TrainState,
    batch: Batch,
    *,
    plan: Plan,
    world: World,
) -> Losses:
    """Take one step of gradient descent on scaled rows, with all ranks.

    Dead features are judged before the step. Gradients are summed over the ranks' rows; that of the decoder is
    made tangent; then their norm is limited. Rows of the decoder are brought back to unit norm after Adam,
    whose step is not tangent.

    Raises
    ------
    NotFiniteError
        The loss of the global batch is not finite; on all ranks parameters, optimiser and state are as before.
    """
    optimiser.zero_grad()
    losses = sae.losses(batch, dead=state.dead(plan.dead_after_rows), world=world)
    loss = float(world.all_reduce(losses.total.detach(), axis="data"))
    if not math.isfinite(loss):
        raise NotFiniteError(f"loss {loss}")
    torch.autograd.backward(losses.total)
    sum_gradients_(sae, world)
    sae.before_step()
    clip_gradients_(sae, plan.clip_norm, world)
    set_rate(optimiser, learning_rate(state.step, plan))
    optimiser.step()
    sae.after_step(losses, world=world)
    state.advance(losses.codes, world)
    return losses
