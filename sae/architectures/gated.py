"""Gated: dictionaries that were trained elsewhere, one affine map choosing features and another sizing them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sae import operators
from sae.base import InferenceOnly, SAEConfig
from sae.codes import SparseCodes, subset
from sae.world import ALONE, World


class GatedConfig(SAEConfig):
    """A gate and a magnitude per feature; read and exported only, for dictionaries that were trained elsewhere."""

    trainable = False

    kind: Literal["gated"] = "gated"
    k: int = Field(1, gt=0)
    """Not used: as many features are active as pass their gate."""

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> Gated:
        """Return a dictionary to load weights into."""
        return Gated(self, d_in, generator=generator, world=world)


class Gated(InferenceOnly):
    """z = 1[v + b_enc > 0] ReLU(exp(r_mag) v + b_mag) for v = (x - b_dec) W_encᵀ; b_enc is the gate's bias.

    Attributes
    ----------
    r_mag : Float[Tensor, "d_sae"]
        Logarithm of the magnitude's scale.
    b_mag : Float[Tensor, "d_sae"]
        The magnitude's bias, in units of the input, so folding scales it.

    References
    ----------
    arXiv 2404.16014, section 3.
    """

    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, config: SAEConfig, d_in: int, *, generator: torch.Generator, world: World) -> None:
        super().__init__(config, d_in, generator=generator, world=world)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def select(self, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """Keep the entries that pass their gate, not sized yet."""
        return self.kernels.select_above(x, W, b, threshold=b.new_zeros(()))

    @torch.no_grad()
    def scale_state_(self, scale: float) -> None:
        """Scale the magnitude's bias."""
        self.b_mag.mul_(scale)

    def _encode(self, x: Float[Tensor, "batch d_in"], select: operators.Select) -> SparseCodes:
        open_ = super()._encode(x, select)
        b_enc, r_mag, b_mag = (
            t.index_select(0, open_.features) for t in (self.b_enc, self.r_mag, self.b_mag)
        )
        sizes = (open_.values - b_enc) * r_mag.exp() + b_mag
        return subset(open_._replace(values=sizes), ~(sizes <= 0))
