"""Intervals from resampling whole entities: sums for F1 and its kin, weighted cumulative sums over one order for AP."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

_CHUNK = 1 << 24
"""Cells of the weight matrix expanded to rows at once: 64 MiB in single precision."""


class Interval(NamedTuple):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def entity_weights(n_entities: int, n_bootstrap: int, *, seed: int) -> UInt8[np.ndarray, "n_entities draws"]:
    """Return how often each entity occurs in each bootstrap sample of all entities: about once, and never 256 times."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 3])))
    out = np.empty((n_entities, n_bootstrap), dtype=np.uint8)
    for b in range(n_bootstrap):
        out[:, b] = np.bincount(rng.integers(0, n_entities, n_entities), minlength=n_entities)
    return out


def interval(value: float, draws: Float[np.ndarray, " draws"]) -> Interval:
    """Return the percentile interval of bootstrap draws around a point value."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def ap_draws(
    value: Float[np.ndarray, " n"],
    member: Int[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    positives: Float[np.ndarray, " draws"],
    total: Float[np.ndarray, " draws"],
    weights: UInt8[np.ndarray, "n_entities draws"],
) -> Float[np.ndarray, " draws"]:
    """Return the average precision of a detector in every bootstrap sample.

    Parameters
    ----------
    value, member, truth
        The rows on which the detector is positive, largest value first; equal values form one threshold.
    positives, total
        Weighted positives and rows of the whole split in every sample; rows not listed tie below all others.
    weights
        From `entity_weights`; a column of ones gives the plain value.

    Notes
    -----
    Only thresholds with a positive row add to AP, so the weights of the rows between two such thresholds are summed
    first (one segment each) and the cumulative sums run over segments.
    """
    draws = weights.shape[1]
    if not len(value):
        return np.asarray(positives / np.maximum(total, 1))
    new = np.append(True, np.diff(value) != 0)
    group = np.cumsum(new) - 1
    hits = np.bincount(group, weights=truth) > 0
    # a segment ends with a group that holds a positive; the rows after the last such group matter to none
    segment: np.ndarray = np.cumsum(hits) - hits
    row_segment: np.ndarray = segment[group]
    n_segments = int(hits.sum())
    used = row_segment < n_segments
    starts = np.flatnonzero(np.diff(row_segment[used], prepend=-1))
    owner, is_true = member[used], truth[used]
    out = np.empty(draws, dtype=np.float64)
    step = max(1, _CHUNK // max(1, int(used.sum())))
    for at in range(0, draws, step):
        part = slice(at, at + step)
        out[part] = _ap(
            weights[owner, part].astype(np.float32), is_true, starts, positives[part], total[part]
        )
    return out


def _ap(
    w: np.ndarray, truth: np.ndarray, starts: np.ndarray, positives: np.ndarray, total: np.ndarray
) -> Float[np.ndarray, " draws"]:
    if not len(starts):
        return np.asarray(positives / np.maximum(total, 1))
    # the weights are counts, so single precision is exact up to 2^24 rows
    exact = np.float32 if total.max() < 1 << 24 else np.float64
    fired = np.cumsum(np.add.reduceat(w, starts, axis=0), axis=0, dtype=exact)
    # every segment holds a positive, so their starts among the positives alone rise as well
    gained = np.add.reduceat(w[truth], np.cumsum(truth)[starts] - truth[starts], axis=0)
    found = np.cumsum(gained, axis=0, dtype=exact)
    positives = np.maximum(positives, 1e-12)
    np.divide(found, np.maximum(fired, 1, out=fired), out=fired)
    ap = (gained * fired).sum(0, dtype=np.float64) / positives
    rest = 1 - found[-1] / positives
    return np.asarray(ap + rest * positives / np.maximum(total, 1e-12))
