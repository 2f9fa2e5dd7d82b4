"""Matryoshka: a BatchTopK dictionary whose prefixes are dictionaries too."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor

from sae.base import Batch, Losses, SAEConfig
from sae.nested import cut_by_feature
from sae.world import ALONE, World

from .batch_topk import BatchTopK

SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
"""Prefixes as shares of d_sae, as published: groups that double, the last one larger by a thirty-second."""


class MatryoshkaConfig(SAEConfig):
    """Nested dictionaries: the first features explain the data by themselves, the others add detail."""

    kind: Literal["matryoshka"] = "matryoshka"
    prefixes: tuple[int, ...] | Literal["auto"] = Field("auto")
    """Sizes of the nested dictionaries, ascending up to d_sae; auto = 1/32, 3/32, 7/32, 15/32 and all of it."""
    detached: bool = False
    """Whether the error of a prefix teaches only the features that it adds; that of the whole teaches all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_prefixes(self.prefixes, self.d_sae)
        return self

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> Matryoshka:
        """Return a freshly initialised Matryoshka dictionary."""
        return Matryoshka(
            self, d_in, prefixes=self.prefixes, detached=self.detached, generator=generator, world=world
        )


class Matryoshka(BatchTopK):
    """BatchTopK over all features; the loss is the mean over prefixes p of |x - b_dec - Σ_{j < p} z_j W_dec[j]|².

    Attributes
    ----------
    prefixes : tuple[int, ...]
        Sizes of the nested dictionaries, with `auto` resolved.
    detached : bool
        Whether the error of a prefix teaches only the features that it adds; see `sae.nested.nested_errors`.

    References
    ----------
    arXiv 2503.17547, section 3. Deviations: the prefixes are fixed, not drawn anew for every batch; all weigh
    the same; AuxK takes the residual of the whole dictionary.
    """

    stackable = True
    prefixes: tuple[int, ...]
    detached: bool

    def __init__(
        self,
        config: SAEConfig,
        d_in: int,
        *,
        prefixes: tuple[int, ...] | Literal["auto"],
        detached: bool = False,
        generator: torch.Generator,
        world: World,
    ) -> None:
        super().__init__(config, d_in, generator=generator, world=world)
        self.detached = detached
        self.prefixes = published_prefixes(config.d_sae) if prefixes == "auto" else prefixes

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return the mean squared error over prefixes + aux_alpha · AuxK, codes chosen over the global batch."""
        x, codes = batch.x, self._compete(batch.x)
        here = [min(max(p - self.first_feature, 0), self.d_sae) for p in self.prefixes]
        own = codes
        if self.members > 1:
            own = codes._replace(features=codes.features % (self.d_sae // self.members))
        cut = cut_by_feature(own, here)._replace(features=codes.features)
        return self._nested_losses(x, codes, cut, dead, world, detached=self.detached)


def published_prefixes(d_sae: int) -> tuple[int, ...]:
    """Return the published shares of d_sae as distinct numbers of features."""
    return tuple(sorted({max(1, round(share * d_sae)) for share in SHARES}))


def check_prefixes(prefixes: tuple[int, ...] | Literal["auto"], d_sae: int) -> None:
    """Raise ValueError unless prefixes ascend from above 0 to d_sae."""
    if prefixes != "auto" and (
        not prefixes or list(prefixes) != sorted(set(prefixes)) or prefixes[0] < 1 or prefixes[-1] != d_sae
    ):
        raise ValueError(f"prefixes have to ascend from above 0 to d_sae = {d_sae}, got {list(prefixes)}")
