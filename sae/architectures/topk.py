"""TopK: the k largest positive pre-activations of each row, in training and after."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from sae.base import SAE, Batch, Losses, SAEConfig
from sae.codes import SparseCodes
from sae.world import ALONE, World


class TopKConfig(SAEConfig):
    """The k largest positive features of every row."""

    kind: Literal["topk"] = "topk"

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> TopK:
        """Return a freshly initialised TopK dictionary."""
        return TopK(self, d_in, generator=generator, world=world)


class TopK(SAE):
    """z keeps the k largest entries of (x - b_dec) W_encᵀ + b_enc that are positive.

    References
    ----------
    arXiv 2406.04093, section 2.3. The ReLU that the paper drops is kept: codes are positive.
    """

    stackable = True
    mixes_k = True

    def select(self, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """Keep the k largest positive entries of each row; ties go to the lower feature."""
        return self._select_k(lambda kernels: kernels.select_rows, x, W, b)

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return mean squared error + aux_alpha · AuxK."""
        return self._losses(batch.x, self.encode(batch.x), dead, world)
