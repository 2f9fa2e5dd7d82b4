"""Batches for the loop: raw rows from a loader, scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import Batch
from sae.world import ALONE, World


@runtime_checkable
class LoadedRows(Protocol):
    """A batch as a loader gives it."""

    @property
    def x(self) -> Tensor:
        """Raw activations [batch, d_in], float32."""

    @property
    def entity(self) -> Tensor | None:
        """Whom each row is about, where runs of rows are kept together."""

    @property
    def position(self) -> Tensor | None:
        """Where in its entity's sequence each row is."""


@runtime_checkable
class LoadsBatches(Protocol):
    """What the loop asks of a loader; `ShuffledLoader` is one."""

    wait_seconds: float

    @property
    def rows_per_epoch(self) -> int:
        """Rows before any is served again."""

    def next_batch(self) -> LoadedRows:
        """Return the next batch, without end."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""


@dataclass(frozen=True)
class Inputs:
    """Batches and how they are scaled: x' = (x - mean) / scale.

    Attributes
    ----------
    loader
        Raw rows.
    mean : Float[Tensor, "d_in"]
        Mean of the training rows, fp32, on the device.
    scale : float
        Root of the mean variance.
    world : World
        Who gets the other rows of a batch.
    """

    loader: LoadsBatches
    mean: Float[Tensor, "d_in"]
    scale: float
    world: World = ALONE

    def next(self) -> Batch:
        """Return the next batch, scaled; a collective where rows come with their coordinates."""
        rows = self.loader.next_batch()
        x = (rows.x - self.mean) / self.scale
        if rows.entity is None or rows.position is None:
            return Batch(x)
        place = torch.stack([rows.entity, rows.position], dim=1).to(x.device)
        # the row before a rank's first is the last of the rank before it
        lasts = self.world.stack(place[-1], axis="data")
        rank = self.world.coordinate("data")
        before = lasts[rank - 1 : rank] if rank else place[:1]
        step = torch.cat([before, place]).diff(dim=0)
        return Batch(x, (step[:, 0] == 0) & (step[:, 1] == 1))

    def peek(self) -> Batch:
        """Return the batch that the next step will see, and go back."""
        position, waited = self.loader.state_dict(), self.loader.wait_seconds
        batch = self.next()
        self.loader.load_state_dict(position)
        self.loader.wait_seconds = waited
        return batch

    def sample(self, rows: int, world: World) -> Float[Tensor, "rows d_in"]:
        """Return the next global batches, at least `rows` rows of them, the same on all ranks, and go back."""
        position, waited = self.loader.state_dict(), self.loader.wait_seconds
        own = [self.next().x]
        while len(own) * len(own[0]) * world.axes["data"] < rows:
            own.append(self.next().x)
        self.loader.load_state_dict(position)
        self.loader.wait_seconds = waited
        # [ranks, batches, rows, d_in]: of each batch the ranks' parts follow one another
        return world.stack(torch.stack(own), axis="data").transpose(0, 1).flatten(0, 2)
