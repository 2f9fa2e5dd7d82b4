"""How well probabilities of default rank and are calibrated."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

BINS = 10


class Discrimination(NamedTuple):
    """Ranking and calibration of probabilities against outcomes."""

    n: int
    rate: float
    """Share of outcomes that are 1."""
    auc: float
    gini: float
    ks: float
    """Largest distance between the score distributions of the two outcomes (Kolmogorov-Smirnov)."""
    brier: float
    """Mean squared error of the probability."""
    calibration_error: float
    """Mean |observed rate - mean probability| over ten equally filled bins, weighted by their size."""
    calibration: list[dict[str, float]]
    """The bins, at most ten: n, mean probability, observed rate."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return self._asdict()


def auc(truth: Float[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float:
    """Return the area under the ROC curve: P(score of a 1 above score of a 0), ties half."""
    positive = truth > 0.5
    n1 = int(positive.sum())
    n0 = len(truth) - n1
    if not n0 or not n1:
        return float("nan")
    from scipy.stats import rankdata

    return float((rankdata(score)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def calibration_bins(score: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the bin of every score, given in ascending order: ten that are equally filled but for ties.

    Equal scores share the bin of their middle, so a constant score is one bin and not ten by chance.
    """
    starts = np.flatnonzero(np.append(True, np.diff(score) != 0))
    ends = np.append(starts[1:], len(score)) - 1
    equally = np.repeat(np.arange(BINS), [len(part) for part in np.array_split(score, BINS)])
    return np.repeat(equally[(starts + ends) // 2], ends - starts + 1)


def discrimination(truth: Float[np.ndarray, " n"], probability: Float[np.ndarray, " n"]) -> Discrimination:
    """Return ranking and calibration figures; truth is 0 or 1."""
    value = auc(truth, probability)
    order = np.argsort(probability, kind="stable")
    ones = np.cumsum(truth[order]) / max(truth.sum(), 1)
    zeros = np.cumsum(1 - truth[order]) / max((1 - truth).sum(), 1)
    filled = calibration_bins(probability[order])
    bins = [
        {
            "n": float(len(part)),
            "predicted": float(probability[part].mean()),
            "observed": float(truth[part].mean()),
        }
        for part in np.split(order, np.flatnonzero(np.diff(filled)) + 1)
    ]
    error = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / len(truth)
    return Discrimination(
        n=len(truth),
        rate=float(truth.mean()),
        auc=value,
        gini=2 * value - 1,
        ks=float(np.abs(ones - zeros)[np.append(np.diff(probability[order]) != 0, True)].max()),
        brier=float(np.square(probability - truth).mean()),
        calibration_error=float(error),
        calibration=bins,
    )


def auc_difference(
    truth: Float[np.ndarray, " n"],
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    entity: Int[np.ndarray, " n"],
    *,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return AUC(first) - AUC(second) with a 95% interval from resampling whole entities (paired)."""
    difference = auc(truth, first) - auc(truth, second)
    codes, where = np.unique(entity, return_inverse=True)
    rng = np.random.Generator(np.random.Philox(seed))
    draws = []
    for _ in range(n_bootstrap):
        weight = np.bincount(rng.integers(0, len(codes), len(codes)), minlength=len(codes))[where]
        draws.append(_weighted_auc(truth, first, weight) - _weighted_auc(truth, second, weight))
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return difference, float(low), float(high)


def _weighted_auc(truth: np.ndarray, score: np.ndarray, weight: np.ndarray) -> float:
    values, group = np.unique(score, return_inverse=True)
    ones = np.bincount(group, weights=weight * truth, minlength=len(values))
    zeros = np.bincount(group, weights=weight * (1 - truth), minlength=len(values))
    below = np.cumsum(zeros) - zeros
    total = ones.sum() * zeros.sum()
    return float((ones * (below + 0.5 * zeros)).sum() / total) if total else float("nan")
