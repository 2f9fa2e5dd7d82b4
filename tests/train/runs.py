"""Rows made of known directions, a loader over rows in memory, and runs over both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAEConfig
from sae.config import parse_config
from sae.world import World
from train.inputs import Inputs
from train.plan import TrainConfig, make_plan
from train.trainer import Trainer


class Planted(NamedTuple):
    """Rows [rows, d_in] that are sparse sums of unit directions [features, d_in]."""

    x: Tensor
    directions: Tensor


def plant(rows: int, *, d_in: int = 128, features: int = 768, l0: float = 10, seed: int = 0) -> Planted:
    """Draw unit directions, let each fire at rate l0 / features with size 1 ± 0.3, add a mean."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((features, d_in))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    x = np.empty((rows, d_in), np.float32)
    for start in range(0, rows, 10_000):
        n = min(10_000, rows - start)
        sizes = np.abs(1 + 0.3 * rng.standard_normal((n, features)))
        x[start : start + n] = (sizes * (rng.random((n, features)) < l0 / features)) @ directions
    return Planted(
        torch.from_numpy(x + rng.standard_normal(d_in).astype(np.float32)), torch.from_numpy(directions)
    )


ENTITY_ROWS = 12
"""Rows of an entity, where rows come with coordinates."""


class Rows(NamedTuple):
    x: Tensor
    entity: Tensor | None = None
    position: Tensor | None = None


class MemoryLoader:
    """Serves shuffled rows, or runs of them with coordinates, without end, and goes to any position at once."""

    def __init__(
        self, x: Tensor, *, batch_size: int, seed: int = 0, world: World | None = None, run_length: int = 1
    ) -> None:
        self.run_length = run_length
        self.x, self.batch_size, self.seed, self.world = x, batch_size, seed, world or World()
        self.batch, self.wait_seconds = 0, 0.0
        self._epoch, self._order = -1, torch.empty(0)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.x) // self.run_length * self.run_length // self.batch_size * self.batch_size

    def next_batch(self) -> Rows:
        runs = len(self.x) // self.run_length
        per_epoch = runs * self.run_length // self.batch_size
        epoch, at = divmod(self.batch, per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            first = torch.randperm(runs, generator=generator)[:, None] * self.run_length
            self._order, self._epoch = (first + torch.arange(self.run_length)).flatten(), epoch
        self.batch += 1
        share = self.batch_size // self.world.axes["data"]
        first = at * self.batch_size + self.world.coordinate("data") * share
        at = self._order[first : first + share]
        if self.run_length == 1:
            return Rows(self.x[at])
        return Rows(self.x[at], at // ENTITY_ROWS, at % ENTITY_ROWS)

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batch = state["batch"]


def make_trainer(
    planted: Planted,
    work: Path,
    *,
    sae: Mapping[str, Any],
    seed: int = 0,
    world: World | None = None,
    **train: Any,
) -> Trainer:
    world = world or World()
    config = parse_config(SAEConfig, dict(sae), where="test")
    settings = parse_config(TrainConfig, train, where="test")
    plan = make_plan(settings, config)
    mean = planted.x.double().mean(0).float()
    scale = float((planted.x - mean).double().square().mean().sqrt())
    dictionary = config.build(planted.x.shape[1], generator=torch.Generator().manual_seed(seed), world=world)
    # of three, so that ranks cut them
    run_length = 3 if dictionary.reads_previous else 1
    loader = MemoryLoader(
        planted.x, batch_size=plan.batch_size, seed=seed, world=world, run_length=run_length
    )
    inputs = Inputs(loader, mean, scale, world)
    return Trainer(dictionary, inputs, plan, settings, work=work, provenance={"seed": seed}, world=world)
