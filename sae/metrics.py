"""The measures of a dictionary, one definition each: streamed, mergeable, blind to the split into batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .codes import SparseCodes
from .geometry import normalise_rows_, unit_directions

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


def _no_dimensions() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class Variance:
    """Sums of squares of rows and reconstructions, per dimension, in float64.

    `total` and `power` are about the means of x and of x̂, `cross` is the sum of products about both,
    `residual` that of (x - x̂)². Batches are combined by the update of Chan, Golub and LeVeque, which loses
    nothing to a large mean.
    """

    rows: int = 0
    mean: Float[Tensor, "d_in"] = field(default_factory=_no_dimensions)
    mean_hat: Float[Tensor, "d_in"] = field(default_factory=_no_dimensions)
    total: Float[Tensor, "d_in"] = field(default_factory=_no_dimensions)
    power: Float[Tensor, "d_in"] = field(default_factory=_no_dimensions)
    cross: Float[Tensor, "d_in"] = field(default_factory=_no_dimensions)
    residual: Float[Tensor, "d_in"] = field(default_factory=_no_dimensions)

    def update(self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> None:
        """Add a batch and its reconstruction."""
        x, x_hat = x.detach().cpu().double(), x_hat.detach().cpu().double()
        mean, mean_hat = x.mean(0), x_hat.mean(0)
        about, about_hat = x - mean, x_hat - mean_hat
        self.merge(
            Variance(
                rows=len(x),
                mean=mean,
                mean_hat=mean_hat,
                total=about.square().sum(0),
                power=about_hat.square().sum(0),
                cross=(about * about_hat).sum(0),
                residual=(x - x_hat).square().sum(0),
            )
        )

    def merge(self, other: Variance) -> None:
        """Add the rows of `other`."""
        if other.rows == 0:
            return
        if self.rows == 0:
            vars(self).update(vars(other))
            return
        rows = self.rows + other.rows
        apart, apart_hat = other.mean - self.mean, other.mean_hat - self.mean_hat
        weight = self.rows * other.rows / rows
        self.total = self.total + other.total + weight * apart.square()
        self.power = self.power + other.power + weight * apart_hat.square()
        self.cross = self.cross + other.cross + weight * apart * apart_hat
        self.residual = self.residual + other.residual
        self.mean = self.mean + apart * (other.rows / rows)
        self.mean_hat = self.mean_hat + apart_hat * (other.rows / rows)
        self.rows = rows

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: Σ|x - x̂|² / Σ|x - mean|²; NaN where the data does not vary."""
        return self.fvu_about(self.mean)

    def fvu_about(self, mean: Float[Tensor, "d_in"]) -> float:
        """Return the same about a given mean, such as that of a data set of which these rows are a part."""
        total = float((self.total + self.rows * (self.mean - mean).square()).sum())
        return float(self.residual.sum()) / total if total > 0 else float("nan")

    @property
    def fvu_per_dimension(self) -> Float[Tensor, "d_in"]:
        """The same for each dimension; NaN for one that does not vary."""
        return torch.where(self.total > 0, self.residual / self.total, torch.nan)

    @property
    def shrinkage(self) -> float:
        """By what share reconstructions are too small: 1 - Σ|x̂ - mean|² / Σ (x̂ - mean)·(x - mean).

        0 is unbiased, negative too large; NaN where reconstructions do not vary with the data.

        References
        ----------
        arXiv 2404.16014: 1 minus their relative reconstruction bias. Theirs is about the origin, this is about
        the data-set mean, for a large mean would hide all shrinkage.
        """
        power = float((self.power + self.rows * (self.mean_hat - self.mean).square()).sum())
        cross = float(self.cross.sum())
        return 1 - power / cross if cross > 0 else float("nan")


@dataclass
class Segments:
    """FVU and L0 of groups of rows, such as calendar periods.

    Attributes
    ----------
    variances, active : dict[int, ...]
        By segment: its sums of squares, and the number of active features over its rows.
    """

    variances: dict[int, Variance] = field(default_factory=dict)
    active: dict[int, int] = field(default_factory=dict)

    def update(
        self,
        x: Float[Tensor, "batch d_in"],
        x_hat: Float[Tensor, "batch d_in"],
        codes: SparseCodes,
        *,
        segment: Int[Tensor, "batch"],
    ) -> None:
        """Add a batch.

        Parameters
        ----------
        x, x_hat, codes
            Rows, their reconstruction and their codes.
        segment
            The segment of each row.
        """
        counts = codes.offsets.diff()
        for key in torch.unique(segment).tolist():
            chosen = (segment == key).to(x.device)
            self.variances.setdefault(key, Variance()).update(x[chosen], x_hat[chosen])
            self.active[key] = self.active.get(key, 0) + int(counts[chosen].sum())

    def merge(self, other: Segments) -> None:
        """Add the rows of `other`."""
        for key, variance in other.variances.items():
            self.variances.setdefault(key, Variance()).merge(variance)
            self.active[key] = self.active.get(key, 0) + other.active[key]

    def compute(self) -> dict[int, dict[str, int | float]]:
        """Return `rows`, `fvu` about the mean of all segments together, and `l0` of each segment, in order."""
        whole = Variance()
        for variance in self.variances.values():
            whole.merge(variance)
        return {
            key: {
                "rows": self.variances[key].rows,
                "fvu": self.variances[key].fvu_about(whole.mean),
                "l0": self.active[key] / self.variances[key].rows,
            }
            for key in sorted(self.variances)
        }


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
    cosines = (unit_directions(W_dec) @ unit_directions(truth).T).abs().numpy()
    from scipy.optimize import linear_sum_assignment

    features, truths = linear_sum_assignment(cosines, maximize=True)
    pairs = cosines[features, truths]
    return Match(float(pairs.mean()), features, truths, pairs)


def coherence(W_dec: Float[Tensor, "d_sae d_in"], *, rows_at_once: int = 1024) -> Float[Tensor, "d_sae"]:
    """Return for each feature its largest |cosine| with another, in float32 where W_dec lies: 1 is a duplicate."""
    # in float64 all pairs of a large dictionary would take minutes
    unit = W_dec.detach().float().clone()
    normalise_rows_(unit)
    nearest = []
    for start in range(0, len(unit), rows_at_once):
        cosines = (unit[start : start + rows_at_once] @ unit.T).abs_()
        cosines.diagonal(start).zero_()
        nearest.append(cosines.amax(1))
    return torch.cat(nearest)


def is_dead(silent_rows: Int[Tensor, "d_sae"], window: int) -> Bool[Tensor, "d_sae"]:
    """Return which features have been silent for at least `window` global rows."""
    return silent_rows >= window
