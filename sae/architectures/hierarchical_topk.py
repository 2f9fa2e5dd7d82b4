"""Hierarchical TopK: one dictionary that is good at every number of active features."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor

from sae.base import Batch, Losses, SAEConfig
from sae.nested import cut_by_rank
from sae.work import Work
from sae.world import ALONE, World

from .topk import TopK


class HierarchicalTopKConfig(SAEConfig):
    """The k largest positive features of every row, of which fewer are good too."""

    kind: Literal["hierarchical_topk"] = "hierarchical_topk"
    budgets: tuple[int, ...] | Literal["auto"] = Field("auto")
    """Numbers of active features that training serves, ascending up to k; auto = 1, 2, 4, ... and k."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.budgets
        if given != "auto" and (
            not given or list(given) != sorted(set(given)) or given[0] < 1 or given[-1] != self.k
        ):
            raise ValueError(f"budgets have to ascend from above 0 to k = {self.k}, got {list(given)}")
        return self

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> HierarchicalTopK:
        """Return a freshly initialised hierarchical TopK dictionary."""
        return HierarchicalTopK(self, d_in, generator=generator, world=world)


class HierarchicalTopK(TopK):
    """TopK; the loss is the mean over budgets b of |x - b_dec - Σ z_j W_dec[j]|², j over a row's b largest codes.

    Read with k, or with fewer: the largest codes of a row are what a smaller budget would have kept.

    References
    ----------
    arXiv 2505.24473, section 3. Deviation: the budgets are powers of two and k rather than all from 1 to k,
    which costs log k dense passes over the batch instead of k.
    """

    stackable = True
    config: HierarchicalTopKConfig

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets, with `auto` resolved."""
        if self.config.budgets != "auto":
            return self.config.budgets
        return (*(1 << i for i in range((self.config.k - 1).bit_length())), self.config.k)

    @property
    def work(self) -> Work:
        """What a step takes beyond what follows from the sizes."""
        return super().work._replace(reconstructions=len(self.budgets), by_rank=True)

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return the mean squared error over budgets + aux_alpha · AuxK."""
        x, codes = batch.x, self.encode(batch.x)
        cut = cut_by_rank(codes, self.budgets, world=self.world)
        return self._nested_losses(x, codes, cut, dead, world)
