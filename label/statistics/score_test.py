"""A test of association that counts entities, not rows, and its calibration by permuting whole trajectories."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class EntitySums(NamedTuple):
    """Per entity, over the rows where the concept applies; all `[n_entities]`."""

    tp: Float[np.ndarray, " n_entities"]
    """Rows on which the detector fires and the concept holds."""
    fired: Float[np.ndarray, " n_entities"]
    positives: Float[np.ndarray, " n_entities"]
    rows: Float[np.ndarray, " n_entities"]


def score_statistic(sums: EntitySums) -> float:
    """Return the signed, entity-clustered score statistic z of a binary detector against a binary concept.

    With U_e = sum over the rows of entity e of (f - mean f)(y - mean y), z = sum_e U_e / sqrt(sum_e U_e^2), which is
    standard normal without association however dependent an entity's rows are (Liang and Zeger 1986; the score test of
    a logistic regression with a robust variance). Positive: they occur together. 0 where either is constant.
    """
    n = sums.rows.sum()
    if n == 0:
        return 0.0
    f, y = sums.fired.sum() / n, sums.positives.sum() / n
    u = sums.tp - f * sums.positives - y * sums.fired + f * y * sums.rows
    scale = np.sqrt(np.square(u).sum())
    return float(u.sum() / scale) if scale > 0 else 0.0


def p_value(statistic: Float[np.ndarray, " n"], inflation: float = 1.0) -> Float[np.ndarray, " n"]:
    """Return one-sided p-values, the statistic shrunk by sqrt(inflation) where the null is wider than normal."""
    from scipy.special import ndtr

    p: np.ndarray = ndtr(-np.asarray(statistic) / np.sqrt(max(1.0, inflation)))
    return p


class Calibration(NamedTuple):
    """How the test behaves when there is nothing to find."""

    n: int
    """Statistics under permutation that were looked at."""
    rejected: float
    """Share of them with p < 0.05."""
    inflation: float
    """(95% quantile of z over that of a normal)^2, at least 1; the p-values of the run are widened by it.

    Taken in the tail that is tested: with rare features the null leans to the left, so its median says little.
    """


def calibration(null: Float[np.ndarray, " n"]) -> Calibration:
    """Summarise statistics computed on permuted data."""
    null = null[null != 0]
    if not len(null):
        return Calibration(0, float("nan"), 1.0)
    from scipy.special import ndtr, ndtri

    tail = max(float(np.quantile(null, 0.95)), 0.0) / float(ndtri(0.95))
    return Calibration(len(null), float((ndtr(-null) < 0.05).mean()), max(1.0, tail**2))


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return BH-adjusted p-values: the smallest false discovery rate at which each would be rejected."""
    n = len(p)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * n / np.arange(1, n + 1)
    q = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    out = np.empty(n)
    out[order] = q
    return out
