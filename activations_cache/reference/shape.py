"""The reference model as the configuration names it, and its untrained twin."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from activations_cache.inputs import PanelAdapter
from activations_cache.models import ModelConfig

from .credit_transformer import CreditTransformer
from .histories import credit_inputs


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

    def load(self, fitted: Path | None) -> CreditTransformer:
        """Load what the run fitted."""
        assert fitted is not None
        return CreditTransformer.from_pretrained(fitted)  # type: ignore[no-any-return]

    def adapter(self) -> PanelAdapter:
        """Return the adapter of CreditTransformer."""
        return credit_inputs


def reinitialised(model: CreditTransformer, seed: int) -> CreditTransformer:
    """Return the untrained twin: the same shape and input tables, weights drawn anew."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = CreditTransformer(model.config)
    twin.to(next(model.parameters()).device).eval()
    return twin
