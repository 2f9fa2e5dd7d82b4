"""A test of association that counts entities, not rows, against permutations of whole trajectories."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

ROUNDING = 1e-16
"""Sum of U_e^2 over the squares of the terms of U_e up to which nothing but rounding is left of them."""


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
    a logistic regression with a robust variance). Positive: they occur together. 0 where every U_e is: where either is
    constant, or one the same for all entities and the other for all rows of one.
    """
    n = sums.rows.sum()
    if n == 0:
        return 0.0
    f, y = sums.fired.sum() / n, sums.positives.sum() / n
    terms = np.stack([sums.tp, -f * sums.positives, -y * sums.fired, f * y * sums.rows])
    u = terms.sum(axis=0)
    squares = np.square(u).sum()
    return float(u.sum() / np.sqrt(squares)) if squares > ROUNDING * np.square(terms).sum() else 0.0


class Null(NamedTuple):
    """What the statistic of every pair is when whole trajectories of its concept are given to other entities."""

    statistics: Float[np.ndarray, "permutations pairs"]
    kept: Float[np.ndarray, " pairs"]
    """Share of the rows where the concept applies that have a donor's row at their time, on average."""

    def of(self, pairs: Bool[np.ndarray, " pairs"]) -> Null:
        """Return that of some pairs."""
        return Null(self.statistics[:, pairs], self.kept[pairs])

    @property
    def center(self) -> Float[np.ndarray, " pairs"]:
        """Each pair's mean; one above 0 as it would be on all rows, as a statistic falls at most with their root."""
        mean: np.ndarray = self.statistics.mean(axis=0)
        return np.where(mean > 0, mean / np.sqrt(np.where(self.kept > 0, self.kept, 1)), mean)

    @property
    def width(self) -> Float[np.ndarray, " pairs"]:
        """Each pair's deviation upwards, at least 1."""
        return _width(self.statistics)


def p_values(
    statistic: Float[np.ndarray, " pairs"], null: Null, inflation: float = 1.0
) -> Float[np.ndarray, " pairs"]:
    """Return one-sided p-values of statistics: the larger of the plain test's and of that against the pair's permutations.

    The plain test takes z for standard normal. Of m permutations t = (z - center) / (width sqrt(1 + 1/m)), where width is
    max(1, root of twice the mean square of what is above the mean), the standard deviation of a symmetric null.
    Rare features have nulls that lean far to the left, of which the standard deviation would say what the upper
    tail does not have. The square of the width varies by 2.45 / m of itself (for a normal null, by the delta
    method), that of a whole deviation of n degrees of freedom by 2 / n, so t is Student's with 0.8 m.

    Parameters
    ----------
    statistic
        Observed, of each pair.
    null
        Of the same pairs.
    inflation
        From `calibration`; statistics are shrunk by its square root.
    """
    shrunk = np.sqrt(max(1.0, inflation))
    m = len(null.statistics)
    t = (statistic - null.center) / (null.width * np.sqrt(1 + 1 / m))
    return _larger_p(statistic / shrunk, t / shrunk, m)


class Calibration(NamedTuple):
    """How the test behaves when there is nothing to find: each permutation, held against the pair's others."""

    n: int
    """Statistics under permutation that were looked at."""
    rejected: float
    """Share of them with p < 0.05."""
    plain: float
    """Share of them with p < 0.05 by a standard normal distribution: what not comparing pairs with their own would do."""
    inflation: float
    """(99% quantile over that of Student's t)^2, at least 1; the p-values of the run are widened by it.

    Taken in the tail that is tested: with rare features the null leans to the left, so its median says little.
    """


def calibration(null: Null) -> Calibration:
    """Hold every permutation against the others of its pair; where either side is constant it is left out."""
    from scipy.special import ndtri, stdtrit

    x, m = null.statistics, len(null.statistics) - 1
    there = x != 0
    if not there.any():
        return Calibration(0, float("nan"), float("nan"), 1.0)
    others = (np.delete(x, b, axis=0) for b in range(m + 1))
    t = np.stack([(own - rest.mean(axis=0)) / _width(rest) for own, rest in zip(x, others, strict=True)])
    t = t[there] / np.sqrt(1 + 1 / m)
    tail = max(float(np.quantile(t, 0.99)), 0.0) / float(stdtrit(_degrees(m), 0.99))
    return Calibration(
        n=len(t),
        rejected=float((_larger_p(x[there], t, m) < 0.05).mean()),
        plain=float((x[there] > ndtri(0.95)).mean()),
        inflation=max(1.0, tail**2),
    )


def _larger_p(z: np.ndarray, t: np.ndarray, m: int) -> np.ndarray:
    from scipy.special import ndtr, stdtr

    p: np.ndarray = np.maximum(ndtr(-z), stdtr(_degrees(m), -t))
    return p


def _width(x: Float[np.ndarray, "m pairs"]) -> Float[np.ndarray, " pairs"]:
    above = np.maximum(x - x.mean(axis=0), 0)
    width: np.ndarray = np.maximum(np.sqrt(2 * np.einsum("mp,mp->p", above, above) / (len(x) - 1)), 1)
    return width


def _degrees(m: int) -> float:
    return 0.8 * m


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return BH-adjusted p-values: the smallest false discovery rate at which each would be rejected."""
    n = len(p)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * n / np.arange(1, n + 1)
    q = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    out = np.empty(n)
    out[order] = q
    return out
