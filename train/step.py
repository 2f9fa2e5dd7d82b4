"""One step of training: from a batch to changed parameters, of a dictionary or of a stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sae.base import SAE, Batch, Losses
from sae.stack import unstack_gradients
from sae.world import World

from .optim import set_rate
from .parallel import clip_gradients_, sum_gradients_
from .plan import Plan
from .schedule import learning_rate
from .state import TrainState


class NotFiniteError(ArithmeticError):
    """A loss is infinite or not a number; nothing was changed.

    Attributes
    ----------
    member
        Whose it is; 0 for a dictionary by itself.
    """

    def __init__(self, loss: float, member: int) -> None:
        super().__init__(f"loss {loss}")
        self.member = member


class Learner(NamedTuple):
    """A dictionary, what changes it, and how fast."""

    sae: SAE
    optimiser: torch.optim.Optimizer
    plan: Plan


def train_step(
    sae: SAE,
    optimiser: torch.optim.Optimizer,
    state: TrainState,
    batch: Batch,
    *,
    plan: Plan,
    world: World,
) -> Losses:
    """Take one step of gradient descent on scaled rows, with all ranks; see `step_together`."""
    return step_together(sae, [Learner(sae, optimiser, plan)], state, batch, world=world)


def step_together(
    whole: SAE, learners: Sequence[Learner], state: TrainState, batch: Batch, *, world: World
) -> Losses:
    """Take one step of gradient descent on scaled rows, with all ranks, for a dictionary or all members of a stack.

    Dead features are judged before the step. Gradients are summed over the ranks' rows; that of the decoder is
    made tangent; then their norm is limited, each learner's by itself. Rows of the decoder are brought back to unit
    norm after Adam, whose step is not tangent.

    Parameters
    ----------
    whole
        The dictionary, or the stack (`sae.stack`) that the learners are the members of.
    learners
        Of one plan, but for the learning rate and when a feature is dead.
    state
        Of the whole.
    batch
        Rows; of a stack, those of all members. How far the run is, the losses learn from the state.
    world
        Who computes.

    Raises
    ------
    NotFiniteError
        The loss of the global batch is not finite; on all ranks parameters, optimisers and state are as before.
    """
    for sae in {whole, *(learner.sae for learner in learners)}:
        sae.zero_grad()
    batch = batch._replace(progress=state.step / learners[0].plan.steps)
    dead = state.dead(*(learner.plan.dead_after_rows for learner in learners))
    losses = whole.losses(batch, dead=dead, world=world)
    torch.autograd.backward(losses.total.sum())
    for member, loss in enumerate(sum_gradients_(whole, losses.total, world).tolist()):
        if not math.isfinite(loss):
            whole.zero_grad()
            raise NotFiniteError(loss, member)
    whole.before_step()
    if len(learners) > 1:
        unstack_gradients(whole, [learner.sae for learner in learners])
    clip_gradients_([learner.sae for learner in learners], learners[0].plan.clip_norm, world)
    for _, optimiser, plan in learners:
        set_rate(optimiser, learning_rate(state.step, plan))
        optimiser.step()
    whole.after_step(losses, world=world)
    state.advance(losses.codes, world)
    return losses
