"""LISTA: a few steps of iterative shrinkage, unrolled, over a Matryoshka decoder."""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sae import operators
from sae.base import Batch, SAEConfig
from sae.codes import SparseCodes
from sae.work import Work
from sae.world import ALONE, World

from .matryoshka import Matryoshka, check_prefixes


class ListaConfig(SAEConfig):
    """A Matryoshka dictionary whose encoder looks again at what a first code leaves unexplained."""

    kind: Literal["lista"] = "lista"
    prefixes: tuple[int, ...] | Literal["auto"] = Field("auto")
    """Sizes of the nested dictionaries, ascending up to d_sae; auto = 1/32, 3/32, 7/32, 15/32 and all of it."""
    detached: bool = True
    """Whether the error of a prefix teaches only the features that it adds; that of the whole teaches all."""
    by_rate: bool = True
    """Whether prefixes hold the features that fire most often of late, in place of the first ones."""
    steps: int = Field(1, ge=1)
    """Looks at the residual after the first code; each costs another encoder product."""
    step_size: float = Field(0.3, gt=0)
    """Share of the residual that a look adds to the input; more than 1 overshoots."""
    k_start: float = Field(1, ge=1)
    """Multiple of k at which active features start, to fall evenly to k; 2.4 (published) helps if k is not too large."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_prefixes(self.prefixes, self.d_sae)
        return self

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> Lista:
        """Return a freshly initialised LISTA dictionary."""
        return Lista(
            self, d_in, prefixes=self.prefixes, detached=self.detached, by_rate=self.by_rate, generator=generator,
            world=world,
        )  # fmt: skip


class Lista(Matryoshka):
    """Matryoshka with the encoder x_0 = x, x_{t+1} = x_t + η (x - decode(topk(encode(x_t)))).

    That is iterative shrinkage with the learned W_enc in the place of the decoder's transpose, since adding
    η W_enc (x - x̂_t) to the pre-activations is adding η (x - x̂_t) to the input; so no pre-activations are
    kept. Steps before the last keep the k largest of each row, in training and after, so that a row's code
    depends on no other row; the last selects as BatchTopK does.

    References
    ----------
    Gregor and LeCun, ICML 2010; Chanin, "Letting Claude do autonomous research to improve SAEs", 2026, with the code
    at github.com/chanind/claude-auto-research-synthsaebench, for one step of 0.3 over Matryoshka, the prefixes
    that teach only what they add, their order by rate, and the k that falls from 2.4 k. Deviations: early steps keep
    k of each row, not k per row of the batch; k falls only if asked to, for where it is more than the rows support
    that loses true directions; prefixes are Matryoshka's, errors are averaged rather than summed, the learning rate
    falls as for all kinds. The tilted loss is left out: it weighs a row by 0.002 of its error in means, and with 0.1
    nothing changed.
    """

    config: ListaConfig

    @property
    def work(self) -> Work:
        """What a step takes beyond what follows from the sizes."""
        # k falls from k_start times k, so the first steps take most
        return super().work._replace(active=max(self.active(0.0), self.active(1.0)), looks=self.config.steps)

    def active(self, progress: float) -> int:
        """Return the features per row that training keeps after a share of its steps."""
        k = round(self.config.k * (1 + (self.config.k_start - 1) * (1 - progress)))
        return min(k, self.config.d_sae)

    def _kept(self, batch: Batch) -> SparseCodes:
        k = self.active(batch.progress)
        return self._refine(batch.x, partial(self.kernels.select_batch, k=k), k)

    def _encode(self, x: Float[Tensor, "batch d_in"], select: operators.Select) -> SparseCodes:
        return self._refine(x, select, self.config.k)

    def _refine(self, x: Float[Tensor, "batch d_in"], select: operators.Select, k: int) -> SparseCodes:
        """Return what `select` keeps after the looks at the residual of k features per row."""
        early = partial(self.kernels.select_rows, k=k)
        target = x
        for _ in range(self.config.steps):
            target = target + self.config.step_size * (x - self.decode(super()._encode(target, early)))
        return super()._encode(target, select)
