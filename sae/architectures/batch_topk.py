"""BatchTopK: the k · rows largest positive pre-activations of a batch; afterwards a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base import SAE, Batch, Losses, SAEConfig
from sae.codes import SparseCodes
from sae.work import Work
from sae.world import ALONE, World

EMA = 0.999
"""How much of the threshold's running mean a step keeps."""


class BatchTopKConfig(SAEConfig):
    """As many features as a row needs, k on average."""

    kind: Literal["batch_topk"] = "batch_topk"

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> BatchTopK:
        """Return a freshly initialised BatchTopK dictionary."""
        return BatchTopK(self, d_in, generator=generator, world=world)


class BatchTopK(SAE):
    """In training z keeps the k · rows largest positive entries of the global batch; then those > threshold.

    The threshold is the mean over steps, weighted by 0.999^age and corrected for the missing past, of the
    smallest code in the global batch. The comparison is strict, as in the JumpReLU dictionaries that this one
    exports to. Before the first step the threshold is 0: a ReLU.

    Attributes
    ----------
    threshold : Float[Tensor, ""]
        In units of the input, so folding scales it.
    threshold_weight : Float[Tensor, ""]
        1 - 0.999^steps, the correction.

    When training ends, `settle` takes the plain mean over a sample instead: while the learning rate falls the
    smallest code falls with it, faster than the running mean follows (measured: L0 8 instead of 16).

    References
    ----------
    arXiv 2412.06410, section 3.
    """

    stackable = True
    mixes_k = True
    threshold: Tensor
    threshold_weight: Tensor

    def __init__(self, config: SAEConfig, d_in: int, *, generator: torch.Generator, world: World) -> None:
        super().__init__(config, d_in, generator=generator, world=world)
        self.register_buffer("threshold", torch.zeros((), device=generator.device))
        self.register_buffer("threshold_weight", torch.zeros((), device=generator.device))

    @property
    def work(self) -> Work:
        """What a step takes beyond what follows from the sizes."""
        return super().work._replace(per_row=False)

    def select(self, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """Keep the entries strictly above the threshold."""
        return self.kernels.select_above(x, W, b, threshold=self.threshold)

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return mean squared error + aux_alpha · AuxK, codes chosen over the global batch."""
        return self._losses(batch.x, self._compete(batch.x), dead, world)

    @torch.no_grad()
    def after_step(self, losses: Losses, *, world: World) -> None:
        """Restore unit decoder rows and move the threshold towards the batch's smallest code."""
        super().after_step(losses, world=world)
        self._follow(losses, world)

    def _follow(self, losses: Losses, world: World) -> None:
        """Move the threshold towards the batch's smallest code."""
        smallest = world.all_reduce(_smallest(losses.codes, self.members), "min")
        found = torch.isfinite(smallest)
        weight = self.threshold_weight * EMA + (1 - EMA)
        moved = self.threshold + (smallest - self.threshold) * ((1 - EMA) / weight)
        self.threshold_weight.copy_(torch.where(found, weight, self.threshold_weight))
        self.threshold.copy_(torch.where(found, moved, self.threshold))

    @torch.no_grad()
    def settle(self, batches: Iterable[Tensor], *, world: World) -> None:
        """Set the threshold to the mean over batches of the smallest code that training would keep."""
        smallest = []
        for x in batches:
            smallest.append(world.all_reduce(_smallest(self._compete(x), 1), "min"))
        found = torch.stack(smallest)
        found = found[torch.isfinite(found)]
        if len(found):
            self.threshold.copy_(found.mean())

    @torch.no_grad()
    def scale_state_(self, scale: float) -> None:
        """Scale the threshold."""
        self.threshold.mul_(scale)

    def _compete(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """Return the codes that training keeps: the k · rows largest positive entries of the global batch."""
        return self._encode(x, partial(self._select_k, lambda kernels: kernels.select_batch))


def _smallest(codes: SparseCodes, members: int) -> Tensor:
    """Return the smallest code, infinity where there is none; of a stack, each member's."""
    values = codes.values.detach()
    if members == 1:
        return torch.cat([values, values.new_full((1,), torch.inf)]).min()
    starts = codes.offsets[:: codes.rows // members]
    return torch.segment_reduce(values, "min", offsets=starts, initial=torch.inf)
