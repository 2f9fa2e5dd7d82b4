"""Batches for the loop: raw rows from a loader, scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class LoadedRows(Protocol):
    """A batch as a loader gives it."""

    @property
    def x(self) -> Tensor:
        """Raw activations [batch, d_in], float32."""


@runtime_checkable
class LoadsBatches(Protocol):
    """What the loop asks of a loader; `ShuffledLoader` is one."""

    wait_seconds: float

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
    """

    loader: LoadsBatches
    mean: Float[Tensor, "d_in"]
    scale: float

    def next(self) -> Float[Tensor, "batch d_in"]:
        """Return the next scaled batch."""
        return (self.loader.next_batch().x - self.mean) / self.scale

    def peek(self, rows: int) -> Float[Tensor, "rows d_in"]:
        """Return at least `rows` rows that the next steps will see, and go back."""
        position, waited = self.loader.state_dict(), self.loader.wait_seconds
        batches = [self.next()]
        while len(batches) * len(batches[0]) < rows:
            batches.append(self.next())
        self.loader.load_state_dict(position)
        self.loader.wait_seconds = waited
        return torch.cat(batches)
