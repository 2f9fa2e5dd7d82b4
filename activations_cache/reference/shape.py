"""The reference model and its fitting as the configuration names them, and the untrained twin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

from activations_cache.inputs import PanelAdapter
from activations_cache.models import ModelConfig
from sae.config import Config

from .histories import credit_inputs

if TYPE_CHECKING:
    from .credit_transformer import CreditTransformer


class ModelShape(ModelConfig):
    """Size of the reference model."""

    kind: Literal["credit_transformer"] = "credit_transformer"
    """The reference model that `assay fit` trains."""
    d_model: int = Field(default=128, ge=8)
    """Width of the stream, the `d_in` of its dictionaries."""
    n_layers: int = Field(default=4, ge=1)
    """Number of blocks."""
    n_heads: int = Field(default=4, ge=1)
    """Attention heads of a block; divides d_model."""
    d_ff: int = Field(default=512, ge=8)
    """Width of a block's inner layer."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the stream dropped while fitting."""
    n_knots: int = Field(default=16, ge=2)
    """Knots of each column's piecewise linear code."""
    max_positions: int = Field(default=512, ge=1)
    """Longest history whose positions are told apart."""

    @model_validator(mode="after")
    def _heads_are_even(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")
        return self

    def load(self, fitted: Path | None) -> CreditTransformer:
        """Load what the run fitted."""
        assert fitted is not None
        return load_model(fitted)

    def adapter(self) -> PanelAdapter:
        """Return the adapter of CreditTransformer."""
        return credit_inputs


class FitConfig(Config):
    """How the reference model is trained."""

    epochs: int = Field(default=12, ge=1)
    """At most this many passes over the fit entities."""
    patience: int = Field(default=5, ge=1)
    """Epochs without improvement on the early-stopping entities after which training ends."""
    batch_rows: int = Field(default=1024, ge=1)
    """Padded positions of a batch."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay of the matrices."""
    next_weight: float = Field(default=0.1, ge=0)
    """Weight of forecasting the next row's columns beside the outcome's log loss."""


def load_model(folder: Path) -> CreditTransformer:
    """Load a fitted model, ready to predict; transformers is loaded only now, for it takes seconds."""
    from .credit_transformer import CreditTransformer

    return CreditTransformer.from_pretrained(folder).eval()  # type: ignore[no-any-return]


def reinitialised(model: CreditTransformer, seed: int) -> CreditTransformer:
    """Return the untrained twin: the same shape and input tables, weights drawn anew."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = type(model)(model.config)
    twin.to(next(model.parameters()).device).eval()
    return twin
