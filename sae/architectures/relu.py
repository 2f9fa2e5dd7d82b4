"""ReLU: dictionaries that were trained elsewhere with an L1 penalty."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sae.base import InferenceOnly, SAEConfig
from sae.codes import SparseCodes
from sae.world import ALONE, World


class ReLUConfig(SAEConfig):
    """All positive pre-activations; read and exported only, for dictionaries that were trained elsewhere."""

    trainable = False

    kind: Literal["relu"] = "relu"
    k: int = Field(1, gt=0)
    """Not used: as many features are active as are positive."""

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> ReLU:
        """Return a dictionary to load weights into."""
        return ReLU(self, d_in, generator=generator, world=world)


class ReLU(InferenceOnly):
    """z keeps the positive entries of (x - b_dec) W_encᵀ + b_enc.

    References
    ----------
    arXiv 2309.08600, section 2. Decoder rows are left as they are, of any norm.
    """

    def select(self, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """Keep the positive entries."""
        return self.kernels.select_above(x, W, b, threshold=b.new_zeros(()))
