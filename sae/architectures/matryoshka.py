"""Matryoshka: a BatchTopK dictionary whose prefixes are dictionaries too."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor

from sae.base import Batch, Losses, SAEConfig
from sae.codes import SparseCodes
from sae.nested import cut_by_feature, cut_by_group
from sae.work import Work
from sae.world import ALONE, World

from .batch_topk import BatchTopK

PACE = 0.01
"""How much of a feature's running rate a step replaces, as published."""

SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
"""Prefixes as shares of d_sae, as published: groups that double, the last one larger by a thirty-second."""


class MatryoshkaConfig(SAEConfig):
    """Nested dictionaries: the first features explain the data by themselves, the others add detail."""

    kind: Literal["matryoshka"] = "matryoshka"
    prefixes: tuple[int, ...] | Literal["auto"] = Field("auto")
    """Sizes of the nested dictionaries, ascending up to d_sae; auto = 1/32, 3/32, 7/32, 15/32 and all of it."""
    detached: bool = False
    """Whether the error of a prefix teaches only the features that it adds; that of the whole teaches all."""
    by_rate: bool = False
    """Whether prefixes hold the features that fire most often of late, in place of the first ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_prefixes(self.prefixes, self.d_sae)
        return self

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> Matryoshka:
        """Return a freshly initialised Matryoshka dictionary."""
        return Matryoshka(
            self, d_in, prefixes=self.prefixes, detached=self.detached, by_rate=self.by_rate, generator=generator,
            world=world,
        )  # fmt: skip


class Matryoshka(BatchTopK):
    """BatchTopK over all features; the loss is the mean over prefixes p of |x - b_dec - Σ_{j < p} z_j W_dec[j]|².

    Attributes
    ----------
    prefixes : tuple[int, ...]
        Sizes of the nested dictionaries, with `auto` resolved.
    detached : bool
        Whether the error of a prefix teaches only the features that it adds; see `sae.nested.nested_errors`.
    by_rate : bool
        Whether prefixes hold the features that fire most often.
    rates : Float[Tensor, "d_sae"]
        Only then: the share of rows in which each feature fired, Σ share · 0.01 · 0.99^age over
        steps. Features of equal rates come in their own order, as all do before the first step. Ranks along
        `feature` exchange them at every step: four bytes for each feature.

    References
    ----------
    arXiv 2503.17547, section 3. Deviations: the prefixes are fixed, not drawn anew for every batch; all weigh
    the same; AuxK takes the residual of the whole dictionary.
    """

    stackable = True
    mixes_k = True
    prefixes: tuple[int, ...]
    detached: bool
    by_rate: bool
    rates: Tensor

    def __init__(
        self,
        config: SAEConfig,
        d_in: int,
        *,
        prefixes: tuple[int, ...] | Literal["auto"],
        detached: bool = False,
        by_rate: bool = False,
        generator: torch.Generator,
        world: World,
    ) -> None:
        super().__init__(config, d_in, generator=generator, world=world)
        self.detached, self.by_rate = detached, by_rate
        if by_rate:
            self.register_buffer("rates", torch.zeros_like(self.b_enc.data))
        self.prefixes = published_prefixes(config.d_sae) if prefixes == "auto" else prefixes

    @property
    def work(self) -> Work:
        """What a step takes beyond what follows from the sizes."""
        return super().work._replace(reconstructions=len(self.prefixes), by_rate=self.by_rate)

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return the mean squared error over prefixes + aux_alpha · AuxK, codes chosen over the global batch."""
        x, codes = batch.x, self._kept(batch)
        cut = self._cut_by_rate(codes) if self.by_rate else self._cut(codes)
        return self._nested_losses(x, codes, cut, dead, world, detached=self.detached)

    @torch.no_grad()
    def after_step(self, losses: Losses, *, world: World) -> None:
        """Restore unit decoder rows, and move the threshold and the rates towards what the batch shows."""
        super().after_step(losses, world=world)
        if self.by_rate:
            counts = losses.codes.features.bincount(minlength=self.d_sae)
            rows = losses.codes.rows // self.members * world.axes["data"]
            shares = world.all_reduce(counts, axis="data").to(self.rates.dtype) / rows
            self.rates.lerp_(shares, PACE)

    def _kept(self, batch: Batch) -> SparseCodes:
        """Return the codes that the losses of a batch are of."""
        return self._compete(batch.x)

    def _cut(self, codes: SparseCodes) -> SparseCodes:
        """Cut every row at the features that prefixes end with."""
        here = [min(max(p - self.first_feature, 0), self.d_sae) for p in self.prefixes]
        own = codes
        if self.members > 1:
            own = codes._replace(features=codes.features % (self.d_sae // self.members))
        return cut_by_feature(own, here)._replace(features=codes.features)

    def _cut_by_rate(self, codes: SparseCodes) -> SparseCodes:
        """Cut every row at the ranks, by rate among the features of all shards, that prefixes end with."""
        shards = self.world.stack(self.rates.view(self.members, -1), axis="feature")
        whole = shards.transpose(0, 1).flatten(1)
        ranks = whole.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        own = ranks[:, self.first_feature :][:, : self.d_sae // self.members].flatten()
        inner = torch.tensor(self.prefixes[:-1], dtype=torch.int64, device=own.device)
        return cut_by_group(codes, torch.bucketize(own, inner, right=True), len(self.prefixes))


def published_prefixes(d_sae: int) -> tuple[int, ...]:
    """Return the published shares of d_sae as distinct numbers of features."""
    return tuple(sorted({max(1, round(share * d_sae)) for share in SHARES}))


def check_prefixes(prefixes: tuple[int, ...] | Literal["auto"], d_sae: int) -> None:
    """Raise ValueError unless prefixes ascend from above 0 to d_sae."""
    if prefixes != "auto" and (
        not prefixes or list(prefixes) != sorted(set(prefixes)) or prefixes[0] < 1 or prefixes[-1] != d_sae
    ):
        raise ValueError(f"prefixes have to ascend from above 0 to d_sae = {d_sae}, got {list(prefixes)}")
