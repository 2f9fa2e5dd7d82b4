"""Frozen decoder: the control that shows what training the write directions is worth."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sae.base import Losses, SAEConfig
from sae.world import ALONE, World

from .batch_topk import BatchTopK


class FrozenDecoderConfig(SAEConfig):
    """A control: BatchTopK whose write directions stay random, or close to random ones."""

    kind: Literal["frozen_decoder"] = "frozen_decoder"
    min_cosine: float = Field(1.0, gt=0, le=1)
    """Cosine with its random start that a decoder row keeps at least; 1 = frozen, 0.8 = the published soft control."""

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> FrozenDecoder:
        """Return a freshly initialised control."""
        return FrozenDecoder(self, d_in, generator=generator, world=world)


class FrozenDecoder(BatchTopK):
    """BatchTopK with W_dec fixed at its random start; encoder and biases learn.

    With `min_cosine` below 1 rows move, but only within the cone of that cosine about their start. A figure
    that this control reaches too is no evidence that a dictionary has found anything.

    Attributes
    ----------
    W_start : Float[Tensor, "d_sae d_in"]
        The random start, where rows may move.

    References
    ----------
    arXiv 2602.14111: its Frozen Decoder, and with `min_cosine` 0.8 its Soft-Frozen Decoder. Its third control,
    the frozen encoder, is not here.
    """

    stackable = True
    mixes_k = True
    W_start: Tensor
    config: FrozenDecoderConfig

    def __init__(
        self, config: FrozenDecoderConfig, d_in: int, *, generator: torch.Generator, world: World
    ) -> None:
        super().__init__(config, d_in, generator=generator, world=world)
        if config.min_cosine < 1:
            self.register_buffer("W_start", self.W_dec.detach().clone())
        else:
            self.W_dec.requires_grad_(False)

    def before_step(self) -> None:
        """Make the decoder's gradient tangent, where it has one."""
        if self.W_dec.grad is not None:
            super().before_step()

    @torch.no_grad()
    def after_step(self, losses: Losses, *, world: World) -> None:
        """Bring rows back to unit norm and into their cone, and move the threshold."""
        if self.W_dec.requires_grad:
            super().after_step(losses, world=world)
            confine_rows_(self.W_dec, self.W_start, self.config.min_cosine)
        else:
            self._follow(losses, world)


@torch.no_grad()
def confine_rows_(W: Tensor, start: Tensor, min_cosine: float) -> None:
    """Turn every unit row of W that has left the cone about its unit start back to the cone's surface, in place."""
    cosine = torch.linalg.vecdot(W, start).unsqueeze(1)
    across = W - cosine * start
    across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True).clamp(
        min=torch.finfo(W.dtype).tiny
    )
    surface = min_cosine * start + (1 - min_cosine**2) ** 0.5 * across
    W.copy_(torch.where(cosine < min_cosine, surface, W))
