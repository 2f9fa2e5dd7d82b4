"""What all sparse autoencoders share: parameters, how they read and write, what training asks of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from . import operators
from .codes import SparseCodes
from .config import Family
from .errors import ConfigError
from .geometry import geometric_median, normalise_rows_, project_rows_, unit_rows
from .kernels import Kernels, find_kernels
from .kernels.sharded import sharded
from .losses import auxk, reconstruction
from .nested import nested_errors
from .work import Work
from .world import ALONE, World


class Batch(NamedTuple):
    """Rows to learn from.

    Attributes
    ----------
    x : Float[Tensor, "batch d_in"]
        Scaled activations.
    follows : Bool[Tensor, "batch"] | None
        Whether the row before is the previous position of the same entity; None where nobody asked.
    progress : float
        Share of the training's steps that are done; 1 where nobody trains.
    """

    x: Float[Tensor, "batch d_in"]
    follows: Bool[Tensor, "batch"] | None = None
    progress: float = 1.0


class Losses(NamedTuple):
    """What a batch costs.

    Attributes
    ----------
    total : Float[Tensor, ""]
        The differentiable sum, of a stack each member's; totals along `data` add up to the loss of the global batch,
        along `feature` they are the same.
    parts : dict[str, Tensor]
        Its terms before weighting, detached; as with `total`, those of the ranks along `data` add up.
    codes : SparseCodes
        The codes of the batch.
    x_hat : Float[Tensor, "batch d_in"]
        The reconstruction.
    """

    total: Float[Tensor, "..."]
    parts: dict[str, Tensor]
    codes: SparseCodes
    x_hat: Float[Tensor, "batch d_in"]


class SAEConfig(Family):
    """A dictionary: how many features, how many of them active, and how dead ones are revived."""

    trainable: ClassVar[bool] = True
    reads_previous: ClassVar[bool] = False
    """Whether its losses need `Batch.follows`, and with it rows in the order of their entities."""

    kind: str = "batch_topk"
    d_sae: int = Field(gt=0, le=2**24)
    """Number of features, at most 16,777,216; a run's configuration may say `auto`: what the harvested rows support."""
    k: int = Field(gt=0)
    """Active features per row, on average or exactly, depending on the kind; `auto` likewise."""
    k_aux: PositiveInt | Literal["auto"] = Field("auto")
    """Dead features that explain one row's residual; auto is d_in / 2 (arXiv 2406.04093, section A.2)."""
    aux_alpha: float = Field(1 / 32, ge=0)
    """Weight of the loss that revives dead features, as published; 1/4 loses features that fire rarely."""
    start: Literal["mean", "geometric_median"] = "mean"
    """Where b_dec starts; the mean of scaled inputs is zero, the geometric median resists outliers."""

    def build(self, d_in: int, *, generator: torch.Generator, world: World = ALONE) -> SAE:
        """Return a freshly initialised dictionary on the generator's device: this rank's share of its features.

        Raises
        ------
        ConfigError
            The ranks along `feature` do not divide d_sae.
        """
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
    world
        Who else computes. Ranks along `feature` hold equal and consecutive shares of the features, by rank.

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
    precision : str
        What the encoder's product proposes codes in and one process's AuxK computes in, `fp32` or `bf16`; training
        sets it, and it is not saved.
    d_sae, first_feature : int
        Features that this process holds and the number of their first.
    world : World
        Who holds the others.
    replicated : frozenset[str]
        Parameters and buffers with a first dimension that does not count features; all shards hold them.
    stackable, mixes_k : bool
        Whether several of one configuration can learn as one, and of one but for k; see `sae.stack`. Each kind says so
        for itself.
    ks : tuple[int, ...]
        Active features of a row, k: of a stack each member's.
    """

    replicated: ClassVar[frozenset[str]] = frozenset({"b_dec"})
    stackable: ClassVar[bool] = False
    mixes_k: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # not inherited: what a kind does otherwise than the one it is made of may not hold for several
        cls.stackable = cls.__dict__.get("stackable", False)
        cls.mixes_k = cls.__dict__.get("mixes_k", False)

    def __init__(self, config: SAEConfig, d_in: int, *, generator: torch.Generator, world: World) -> None:
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.ks: tuple[int, ...] = (config.k,)
        self.d_sae = _share(config.d_sae, world.axes["feature"])
        self.folded = False
        self.kernel_name = "auto"
        self.precision = "fp32"
        self.first_feature = world.coordinate("feature") * self.d_sae
        self.world = world
        part = range(self.first_feature, self.first_feature + self.d_sae)
        directions = unit_rows(config.d_sae, d_in, generator=generator, part=part)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(directions.new_zeros(self.d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(directions.new_zeros(d_in))

    @property
    def reads_previous(self) -> bool:
        """Whether its kind does, see `SAEConfig`."""
        return self.config.reads_previous

    @property
    def members(self) -> int:
        """How many it is a stack of: 1 unless `sae.stack` made it."""
        return len(self.ks)

    @property
    def kernels(self) -> Kernels:
        """The kernels it computes with."""
        return self._kernels(self.members)

    @property
    def k_aux(self) -> int:
        """Dead features that share in one row, with `auto` resolved."""
        return max(1, self.d_in // 2) if self.config.k_aux == "auto" else self.config.k_aux

    @property
    def work(self) -> Work:
        """What a step takes beyond what follows from the sizes."""
        return Work(active=max(self.ks))

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

    def per_feature(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that have a row for each feature, by name."""
        return {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if value.ndim and name not in self.replicated
        }

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
        """Multiply thresholds and biases beyond b_enc, all in units of the input, in place; for folding."""
        return

    def _kernels(self, members: int) -> Kernels:
        found = find_kernels(
            self.kernel_name, device=self.W_enc.device, precision=self.precision, members=members
        )
        return sharded(found, self.world, members)

    def _encode(self, x: Float[Tensor, "batch d_in"], select: operators.Select) -> SparseCodes:
        b_dec = self.world.feature_shared(self.b_dec)
        return operators.encode(x, self.W_enc, self.b_enc, b_dec, select=select, kernels=self.kernels)

    def _select_k(
        self, rule: Callable[[Kernels], Callable[..., SparseCodes]], x: Tensor, W: Tensor, b: Tensor
    ) -> SparseCodes:
        """Select by a rule of the kernels that takes k."""
        alike = len(set(self.ks)) == 1
        return rule(self.kernels)(x, W, b, k=self.ks[0] if alike else self.ks)

    def _losses(
        self, x: Float[Tensor, "batch d_in"], codes: SparseCodes, dead: Tensor, world: World
    ) -> Losses:
        """Return the objective of the TopK kinds: mean squared error + aux_alpha · AuxK."""
        x_hat = self.decode(codes)
        error = reconstruction(x, x_hat, world=world, members=self.members)
        return self._revive(x, Losses(error, {"mse": error.detach()}, codes, x_hat), dead, world)

    def _nested_losses(
        self,
        x: Float[Tensor, "batch d_in"],
        codes: SparseCodes,
        cut: SparseCodes,
        dead: Tensor,
        world: World,
        *,
        detached: bool = False,
    ) -> Losses:
        """Return the mean over parts of rows, as `cut`, of the mean squared error + aux_alpha · AuxK."""
        errors, x_hat = nested_errors(
            x, cut, self.W_dec, self.b_dec, kernels=self.kernels, world=world, members=self.members, detached=detached
        )  # fmt: skip
        nested = errors.mean(-1)
        parts = {"mse": errors[..., -1].detach(), "nested": nested.detach()}
        return self._revive(x, Losses(nested, parts, codes, x_hat), dead, world)

    def _revive(self, x: Float[Tensor, "batch d_in"], losses: Losses, dead: Tensor, world: World) -> Losses:
        """Add aux_alpha · AuxK."""
        parameters = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        revival = auxk(
            x, losses.x_hat, parameters, dead=dead, k_aux=self.k_aux, kernels=self._kernels(members=1),
            world=world, members=self.members,
        )  # fmt: skip
        total = losses.total + self.config.aux_alpha * revival
        return losses._replace(total=total, parts={**losses.parts, "auxk": revival.detach()})


class InferenceOnly(SAE):
    """A dictionary that was trained elsewhere: it encodes, decodes, folds and exports, and cannot be trained."""

    def losses(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"], world: World) -> Losses:
        """Refuse.

        Raises
        ------
        ConfigError
            Always.
        """
        raise ConfigError(
            f"{self.config.kind} dictionaries are not trained here, only read",
            do="choose another sae.kind; jumprelu and batch_topk are what replaced it",
        )


def _share(d_sae: int, shards: int) -> int:
    """Return how many features each of some ranks holds."""
    if d_sae % shards:
        raise ConfigError(
            f"{d_sae} features cannot be spread evenly over {shards} processes",
            expected=f"sae.d_sae = {math.ceil(d_sae / shards) * shards}, or another train.mesh.feature",
        )
    return d_sae // shards
