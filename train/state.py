"""How far a training run is: the only thing, besides the parameters, that its steps change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics import is_dead
from sae.world import World


@dataclass
class TrainState:
    """Steps, rows and silences of a run; `advance` is the only method that changes it.

    Attributes
    ----------
    silent_rows : Int[Tensor, "d_sae"]
        Global rows since each of this shard's features last fired, to the end of the batch it fired in.
    step : int
        Steps done.
    rows : int
        Rows of the global batches seen.
    members : int
        Of how many dictionaries, a stack, the features and rows of codes are.
    """

    silent_rows: Int[Tensor, "d_sae"]
    step: int = 0
    rows: int = 0
    members: int = 1

    @classmethod
    def start(cls, d_sae: int, device: torch.device) -> TrainState:
        """Return the state before the first step."""
        return cls(torch.zeros(d_sae, dtype=torch.int64, device=device))

    def dead(self, *windows: int) -> Bool[Tensor, "d_sae"]:
        """Return which features have been silent for at least a window of global rows, of a stack each member's own."""
        members = self.silent_rows.chunk(self.members)
        return torch.cat([is_dead(own, window) for own, window in zip(members, windows, strict=True)])

    def advance(self, codes: SparseCodes, world: World) -> None:
        """Count one step; along `data` every rank has as many rows."""
        rows = codes.rows // self.members * world.axes["data"]
        fired = codes.features.bincount(minlength=len(self.silent_rows)) > 0
        fired = world.all_reduce(fired.to(torch.uint8), "max", axis="data") > 0
        self.silent_rows = torch.where(fired, 0, self.silent_rows + rows)
        self.rows += rows
        self.step += 1
