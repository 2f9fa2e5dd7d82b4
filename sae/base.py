"""What all sparse autoencoders share: parameters, how they read and write, what training asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from . import operators
from .codes import SparseCodes
from .config import Family
from .geometry import geometric_median, normalise_rows_, project_rows_, unit_rows
from .kernels import Kernels, find_kernels
from .losses import auxk, reconstruction
from .world import World


class Batch(NamedTuple):
    """Rows to learn from.

    Attributes
    ----------
    x : Float[Tensor, "batch d_in"]
        Scaled activations.
    """

    x: Float[Tensor, "batch d_in"]


class Losses(NamedTuple):
    """What a batch costs.

    Attributes
    ----------
    total : Float[Tensor, ""]
        The differentiable sum; the totals of all ranks add up to the loss of the global batch.
    parts : dict[str, Tensor]
        Its terms before weighting, detached.
    codes : SparseCodes
        The codes of the batch.
    x_hat : Float[Tensor, "batch d_in"]
        The reconstruction.
    """

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]
    codes: SparseCodes
    x_hat: Float[Tensor, "batch d_in"]


class SAEConfig(Family):
    """A dictionary: how many features, how many of them active, and how dead ones are revived."""

    kind: str = "batch_topk"
    d_sae: int = Field(gt=0)
    """Number of features; a few times d_in, less where the data has few effective dimensions."""
    k: int = Field(gt=0)
    """Active features per row, on average or exactly, depending on the kind."""
    k_aux: int | Literal["auto"] = Field("auto")
    """Dead features that explain one row's residual; auto is d_in / 2 (arXiv 2406.04093, section A.2)."""
    aux_alpha: float = Field(1 / 4, ge=0)
    """Weight of the loss that revives dead features; the published 1/32 left more dead in BatchTopK."""
    start: Literal["mean", "geometric_median"] = "mean"
    """Where b_dec starts; the mean of scaled inputs is zero, the geometric median resists outliers."""

    def build(self, d_in: int, *, generator: torch.Generator) -> SAE:
        """Return a freshly initialised dictionary on the generator's device."""
        raise NotImplementedError(f"{type(self).__name__} names the family; build one of its kinds")


class SAE(nn.Module, ABC):
    """A sparse autoencoder: z = select((x - b_dec) W_encᵀ + b_enc), x̂ = z W_dec + b_dec.

    Both matrices hold one row per feature; W_dec keeps unit rows; codes are positive.

    Parameters
    ----------
    config
        What it was built from; saved with the weights.
    d_in
        Width of the activations.
    generator
        Source of the initial directions.

    Attributes
    ----------
    W_enc, W_dec : Float[Tensor, "d_sae d_in"]
        Read and write directions; they start equal.
    b_enc : Float[Tensor, "d_sae"]
    b_dec : Float[Tensor, "d_in"]
    folded : bool
        Whether it reads raw activations; see `sae.folding.fold`.
    kernel_name : str
        Which kernels it computes with; see `sae.kernels`.
    """

    def __init__(self, config: SAEConfig, d_in: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.d_sae = config.d_sae
        self.folded = False
        self.kernel_name = "auto"
        directions = unit_rows(config.d_sae, d_in, generator=generator)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(directions.new_zeros(config.d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(directions.new_zeros(d_in))

    @property
    def kernels(self) -> Kernels:
        """The kernels it computes with."""
        return find_kernels(self.kernel_name)

    @property
    def k_aux(self) -> int:
        """Dead features that share in one row, with `auto` resolved."""
        return max(1, self.d_in // 2) if self.config.k_aux == "auto" else self.config.k_aux

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """Return the codes of each row, which depend on no other row; differentiable, rows in chunks."""
        return self._encode(x, self.select)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "batch d_in"]:
        """Return Z W_dec + b_dec."""
        return operators.decode(codes, self.W_dec, self.b_dec, kernels=self.kernels)

    @abstractmethod
    def select(self, x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        """Keep the active entries of x Wᵀ + b at inference, for centred x."""

    @abstractmethod
    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Return what the batch costs; changes nothing.

        Parameters
        ----------
        batch
            This rank's rows.
        dead
            Features to revive, the same on all ranks.
        world
            Who else computes.
        """

    def start_at(self, rows: Float[Tensor, "rows d_in"]) -> None:
        """Place b_dec by a sample of scaled inputs, as `config.start` says; before the first step only."""
        if self.config.start == "geometric_median":
            self.b_dec.data.copy_(geometric_median(rows))

    def before_step(self) -> None:
        """Take the part of the decoder's gradient that would change its norms out, in place."""
        assert self.W_dec.grad is not None
        project_rows_(self.W_dec.grad, self.W_dec)

    def after_step(self, losses: Losses, *, world: World) -> None:
        """Restore unit decoder rows; the one place where an architecture's buffers may change."""
        normalise_rows_(self.W_dec)

    def settle(self, batches: Iterable[Tensor], *, world: World) -> None:
        """Fix, once training has ended, what inference uses in place of a batch's competition; here nothing.

        Parameters
        ----------
        batches
            Scaled rows, as training saw them.
        world
            Who computes.
        """

    def scale_state_(self, scale: float) -> None:
        """Multiply the buffers that are in units of the input by `scale`, in place; for folding."""
        return

    def _encode(self, x: Float[Tensor, "batch d_in"], select: operators.Select) -> SparseCodes:
        return operators.encode(x, self.W_enc, self.b_enc, self.b_dec, select=select, kernels=self.kernels)

    def _losses(
        self, x: Float[Tensor, "batch d_in"], codes: SparseCodes, dead: Tensor, world: World
    ) -> Losses:
        """Return the objective of the TopK kinds: mean squared error + aux_alpha · AuxK."""
        x_hat = self.decode(codes)
        error = reconstruction(x, x_hat, world=world)
        parameters = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        revival = auxk(x, x_hat, parameters, dead=dead, k_aux=self.k_aux, world=world)
        parts = {"mse": error.detach(), "auxk": revival.detach()}
        return Losses(error + self.config.aux_alpha * revival, parts, codes, x_hat)
