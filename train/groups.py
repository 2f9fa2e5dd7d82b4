"""Which dictionaries of a sweep learn as one, and how."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sae.base import Batch, Losses
from sae.kernels.sparse import CHUNK_ENTRIES
from sae.stack import shape, stack, unstack_losses

from .optim import update_seconds
from .plan import DEAD_SHARE
from .state import TrainState
from .step import Learner, NotFiniteError, step_together

if TYPE_CHECKING:
    from .trainer import Trainer

SMALL_PRODUCT = 2**28
"""Multiplications of an encoder's product on a CPU up to which a stack is quicker than members side by side."""

TINY_PRODUCT, FEW = 2**25, 4
"""Multiplications up to which a stack of four on one thread is quicker than its members on a thread each."""

STACK_ENTRIES = 2**27
"""Entries of a stack's reconstructions and of its pre-activations at most (512 MiB in fp32)."""


class Group:
    """Trainers that learn as one: those of one shape a stack, any other by itself.

    Parameters
    ----------
    trainers
        Of which several are stacked from now on: see `sae.stack`.

    Attributes
    ----------
    trainers
        Their states and dictionaries are as they are alone after every step.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = tuple(trainers)
        self._lead = lead = self.trainers[0]
        self._sae, self._state = lead.sae, lead.state
        if len(self.trainers) > 1:
            self._sae = stack([trainer.sae for trainer in self.trainers])
            silent = torch.cat([trainer.state.silent_rows for trainer in self.trainers])
            self._state = TrainState(silent, lead.state.step, lead.state.rows, len(self.trainers))

    def probe(self, batch: Batch) -> float:
        """Return about the seconds of a step with `DEAD_SHARE` of the features dead; changes nothing."""
        times = []
        dead = torch.arange(len(self._state.silent_rows), device=batch.x.device) % round(1 / DEAD_SHARE) == 0
        for _ in range(2):
            started = time.perf_counter()
            losses = self._sae.losses(self._repeated(batch), dead=dead, world=self._lead.world)
            torch.autograd.backward(losses.total.sum())
            times.append(time.perf_counter() - started)
            self._sae.zero_grad()
        return min(times) + sum(update_seconds(trainer.sae) for trainer in self.trainers)

    def step(self, batch: Batch, position: Mapping[str, Any]) -> Losses:
        """Learn from a batch and return what it costs, of a stack all of it; see `Trainer.step`."""
        if len(self.trainers) == 1:
            return self._lead.step(batch, position)
        learners = [Learner(t.sae, t.optimiser, t.plan) for t in self.trainers]
        try:
            losses = step_together(
                self._sae, learners, self._state, self._repeated(batch), world=self._lead.world
            )
        except NotFiniteError as error:
            raise self._stopped(error, batch, position) from error
        silent = self._state.silent_rows.chunk(len(self.trainers))
        for trainer, own in zip(self.trainers, silent, strict=True):
            trainer.state = TrainState(own, self._state.step, self._state.rows)
        return losses

    def apart(self, losses: Losses) -> list[Losses]:
        """Return what a batch cost each."""
        return [losses] if len(self.trainers) == 1 else unstack_losses(self._sae, losses)

    def _stopped(self, error: NotFiniteError, batch: Batch, position: Mapping[str, Any]) -> Exception:
        """Return what to raise, after a checkpoint of all: they stand before the same step."""
        stop = self.trainers[error.member].stopped(error, batch, position)
        for trainer in self.trainers:
            trainer.save()
            trainer.checkpoints.finish()
        return stop

    def _repeated(self, batch: Batch) -> Batch:
        """Return the batch as each member reads it."""
        return batch if len(self.trainers) == 1 else Batch(batch.x.repeat(len(self.trainers), 1))


def make_groups(trainers: Sequence[Trainer], *, workers: int) -> list[Group]:
    """Return trainers in groups, so that as many as work at once have as much to do each.

    Those that differ in k, seed and learning rate only are stacked where they are so small that calling costs more than
    computing, and each stack gets small and large k alike. On a mesh that is more often so: a stack's collectives are those
    of one dictionary. All ranks make the same groups.
    """
    alike: dict[str, list[Trainer]] = {}
    for number, trainer in enumerate(trainers):
        plan = replace(trainer.plan, lr=0.0, dead_after_rows=0)
        key = str((shape(trainer.sae), trainer.sae.precision, plan)) if _gains(trainer) else str(number)
        alike.setdefault(key, []).append(trainer)
    share = math.ceil(len(trainers) / workers)
    groups = []
    for same in alike.values():
        stacks = math.ceil(len(same) / _most(same[0], share))
        groups += [Group(own) for own in _dealt(same, stacks)]
    return groups


def _dealt(trainers: Sequence[Trainer], hands: int) -> list[list[Trainer]]:
    """Deal trainers out in order of k, forth and back; in each hand they ascend."""

    def k(trainer: Trainer) -> int:
        return trainer.sae.config.k

    by_k = sorted(trainers, key=k)
    return [
        sorted([*by_k[n :: 2 * hands], *by_k[2 * hands - 1 - n :: 2 * hands]], key=k) for n in range(hands)
    ]


def _most(trainer: Trainer, share: int) -> int:
    """Return how many are stacked, given what each of those who work at once would get."""
    width = _rows(trainer) * max(trainer.sae.d_in, trainer.sae.d_sae)
    least = FEW if _product(trainer) <= TINY_PRODUCT else 1
    return max(1, min(max(share, least), STACK_ENTRIES // width))


def _rows(trainer: Trainer) -> int:
    """Return how many rows of a batch this process reads."""
    return trainer.plan.batch_size // trainer.world.axes["data"]


def _product(trainer: Trainer) -> int:
    return _rows(trainer) * trainer.sae.d_in * trainer.sae.d_sae


def _gains(trainer: Trainer) -> bool:
    small = _product(trainer) <= SMALL_PRODUCT
    if trainer.world.device.type == "cuda":
        small = _rows(trainer) * trainer.sae.d_sae <= CHUNK_ENTRIES
    return trainer.sae.stackable and small
