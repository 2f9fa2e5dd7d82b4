"""The measures of a dictionary, one definition each: streamed, mergeable, blind to the split into batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .codes import SparseCodes

DENSE = 0.5
"""A feature that fires on more than this share of rows is dense."""

RATE_EDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5, 1.0)
"""Edges of the histogram of firing rates, each bin open below and closed above; never is counted apart."""


@dataclass
class Firing:
    """How often features fire.

    Attributes
    ----------
    counts : Int[Tensor, "d_sae"]
        Rows in which each feature fired.
    rows : int
        Rows seen.
    """

    counts: Int[Tensor, "d_sae"]
    rows: int = 0

    @classmethod
    def empty(cls, d_sae: int) -> Firing:
        """Return the statistics of no rows."""
        return cls(torch.zeros(d_sae, dtype=torch.int64))

    def update(self, codes: SparseCodes) -> None:
        """Count a batch."""
        self.counts += codes.features.bincount(minlength=len(self.counts)).cpu()
        self.rows += codes.rows

    def merge(self, other: Firing) -> None:
        """Add the rows of `other`."""
        self.counts = self.counts + other.counts
        self.rows += other.rows

    @property
    def l0(self) -> float:
        """Mean active features per row."""
        return int(self.counts.sum()) / max(1, self.rows)

    @property
    def rates(self) -> Float[Tensor, "d_sae"]:
        """Share of rows in which each feature fires."""
        return self.counts.double() / max(1, self.rows)

    @property
    def dead(self) -> float:
        """Share of features that never fired."""
        return float((self.counts == 0).double().mean())

    @property
    def dense(self) -> float:
        """Share of features that fire on more than half of the rows."""
        return float((self.rates > DENSE).double().mean())

    def histogram(self) -> dict[str, int]:
        """Return the number of features by firing rate."""
        rates = self.rates
        bins = {"never": int((rates == 0).sum())}
        for low, high in pairwise(RATE_EDGES):
            bins[f"({low:g}, {high:g}]"] = int(((rates > low) & (rates <= high)).sum())
        return bins


@dataclass
class Variance:
    """Residual and total sums of squares, per dimension, in float64.

    The total is about the mean of all rows; batches are combined by the update of Chan, Golub and LeVeque,
    which loses nothing to a large mean.
    """

    rows: int = 0
    mean: Float[Tensor, "d_in"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    total: Float[Tensor, "d_in"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    residual: Float[Tensor, "d_in"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def update(self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> None:
        """Add a batch and its reconstruction."""
        x, x_hat = x.detach().cpu().double(), x_hat.detach().cpu().double()
        mean = x.mean(0)
        self.merge(Variance(len(x), mean, (x - mean).square().sum(0), (x - x_hat).square().sum(0)))

    def merge(self, other: Variance) -> None:
        """Add the rows of `other`."""
        if other.rows == 0:
            return
        if self.rows == 0:
            self.rows, self.mean, self.total, self.residual = (
                other.rows,
                other.mean,
                other.total,
                other.residual,
            )
            return
        rows = self.rows + other.rows
        apart = other.mean - self.mean
        self.total = self.total + other.total + apart.square() * (self.rows * other.rows / rows)
        self.mean = self.mean + apart * (other.rows / rows)
        self.residual = self.residual + other.residual
        self.rows = rows

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: Σ|x - x̂|² / Σ|x - mean|²; NaN where the data does not vary."""
        total = float(self.total.sum())
        return float(self.residual.sum()) / total if total > 0 else float("nan")

    @property
    def fvu_per_dimension(self) -> Float[Tensor, "d_in"]:
        """The same for each dimension."""
        return self.residual / self.total


class Match(NamedTuple):
    """The best one-to-one match of a dictionary with true directions.

    Attributes
    ----------
    mcc : float
        Mean |cosine| of the matched pairs; there are min(d_sae, truths) of them.
    features, truths : Int[np.ndarray, "pairs"]
        The pairs.
    cosines : Float[np.ndarray, "pairs"]
        Their |cosine|.
    """

    mcc: float
    features: Int[np.ndarray, "pairs"]
    truths: Int[np.ndarray, "pairs"]
    cosines: Float[np.ndarray, "pairs"]


def match(W_dec: Float[Tensor, "d_sae d_in"], truth: Float[Tensor, "truths d_in"]) -> Match:
    """Match features to true directions so that the summed |cosine| is largest (Hungarian)."""
    cosines = (_unit(W_dec) @ _unit(truth).T).abs().numpy()
    features, truths = linear_sum_assignment(cosines, maximize=True)
    pairs = cosines[features, truths]
    return Match(float(pairs.mean()), features, truths, pairs)


def coherence(W_dec: Float[Tensor, "d_sae d_in"], *, rows_at_once: int = 1024) -> Float[Tensor, "d_sae"]:
    """Return for each feature its largest |cosine| with another: 1 is a duplicate."""
    unit = _unit(W_dec)
    nearest = []
    for start in range(0, len(unit), rows_at_once):
        cosines = (unit[start : start + rows_at_once] @ unit.T).abs()
        cosines.diagonal(start).zero_()
        nearest.append(cosines.amax(1))
    return torch.cat(nearest)


def is_dead(silent_rows: Int[Tensor, "d_sae"], window: int) -> Bool[Tensor, "d_sae"]:
    """Return which features have been silent for at least `window` global rows."""
    return silent_rows >= window


def _unit(W: Tensor) -> Tensor:
    W = W.detach().cpu().double()
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return W / norms.clamp(min=torch.finfo(torch.float64).tiny)
