"""Temporal: a Matryoshka dictionary whose first features say the same of adjacent positions of an entity."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from sae.base import Batch, Losses, SAEConfig
from sae.codes import subset
from sae.contrast import adjacent_contrast
from sae.errors import ConfigError
from sae.world import ALONE, World

from .matryoshka import Matryoshka


class TemporalConfig(SAEConfig):
    """Two nested dictionaries, of which the inner one is to hold what lasts from one position to the next."""

    reads_previous = True

    kind: Literal["temporal"] = "temporal"
    lasting_share: float = Field(0.2, gt=0, lt=1)
    """Share of the features that are to last; they are the first ones."""
    contrast_alpha: float = Field(0.1, ge=0)
    """Weight of the loss by which lasting features tell adjacent positions from others."""
    contrast_pairs: int = Field(256, ge=2)
    """Pairs of adjacent positions among which each is told from the others."""
    temperature: float = Field(0.1, gt=0)
    """What similarities, cosines, are divided by before they compete."""

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> Temporal:
        """Return a freshly initialised temporal dictionary."""
        prefixes = tuple(sorted({max(1, round(self.lasting_share * self.d_sae)), self.d_sae}))
        return Temporal(self, d_in, prefixes=prefixes, generator=generator, world=world)


class Temporal(Matryoshka):
    """Matryoshka of two prefixes, whose first, of lasting features, is contrasted along entities.

    The loss is that of Matryoshka + contrast_alpha · `sae.contrast.adjacent_contrast` of the lasting codes.

    References
    ----------
    arXiv 2511.05541, section 3. Deviations: similarities are cosines divided by a temperature, so that their
    scale is not that of the activations; a row's previous position is a row of the same batch, so that it is
    encoded once, and is reconstructed too; rows without one take part in the reconstruction only.
    """

    config: TemporalConfig

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return the mean squared error over both prefixes + contrast_alpha · contrast + aux_alpha · AuxK.

        Raises
        ------
        ConfigError
            The batch does not say which rows follow one another.
        """
        if batch.follows is None:
            raise ConfigError(
                "temporal dictionaries learn from adjacent positions, and the rows do not say which these are",
                do="harvest into a store that keeps runs of rows together (harvest.run_length=2 or more)",
            )
        losses = super().losses(batch, dead=dead, world=world)
        lasting = min(max(self.prefixes[0] - self.first_feature, 0), self.d_sae)
        contrast = adjacent_contrast(
            subset(losses.codes, losses.codes.features < lasting),
            batch.follows,
            d_sae=max(1, lasting),
            pairs_at_once=self.config.contrast_pairs,
            temperature=self.config.temperature,
            kernels=self.kernels,
            world=world,
        )
        total = losses.total + self.config.contrast_alpha * contrast
        return losses._replace(total=total, parts={**losses.parts, "contrast": contrast.detach()})
