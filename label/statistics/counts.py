"""Screening: how every feature goes with every bin of a concept, from one pass over the codes.

For each feature the pass counts, per threshold level and bin, the rows that exceed the threshold; F1, average
precision at the 64 levels and the exact AUROC of any range of bins follow from these counts and rank sums, for a range's
are the sums of its bins'.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from label.evidence import N_LEVELS, Evidence, Rows

MAX_PREVALENCE = 0.95
"""A target that holds more often than this describes nothing."""
_BLOCK = 1 << 18
"""Entries and cells (feature x level x bin) that are counted at once, as fits a cache; a feature is never divided."""
UNSUPPORTED = 100.0
"""Taken from the skill of a range on too few entities: more than two skills can differ by, so it loses to any other."""


@dataclass(frozen=True)
class Levels:
    """A dictionary's evidence on `discover` with its entries placed on threshold levels, ready for counting."""

    evidence: Evidence
    thresholds: Float[np.ndarray, "d_sae levels"]
    level: Int8[np.ndarray, " nnz"]

    @staticmethod
    def of(evidence: Evidence) -> Levels:
        """Place every entry on its level."""
        thresholds = evidence.thresholds()
        return Levels(evidence, thresholds, evidence.levels(thresholds))


@dataclass(frozen=True)
class Counts:
    """Counts of one concept against every feature.

    Attributes
    ----------
    above
        `[d_sae, levels, bins + 1]`: rows above the level's threshold, summed over bins from the first, so that a range
        of bins is the difference of two entries.
    rank_sum
        `[d_sae, bins + 1]`: mid-ranks of the rows in the bins, summed likewise.
    total
        `[bins + 1]`: rows in the bins, summed likewise; the last entry is the number of rows where the concept
        applies.
    """

    above: Float[np.ndarray, "d_sae levels sums"]
    rank_sum: Float[np.ndarray, "d_sae sums"]
    total: Int[np.ndarray, " sums"]


class Fit(NamedTuple):
    """Every feature's best range of bins of one concept, on `discover`; all arrays are `[d_sae]`."""

    low: Int[np.ndarray, " d_sae"]
    high: Int[np.ndarray, " d_sae"]
    skill: Float[np.ndarray, " d_sae"]
    f1: Float[np.ndarray, " d_sae"]
    level: Int[np.ndarray, " d_sae"]
    """The threshold level of the best F1."""
    auroc: Float[np.ndarray, " d_sae"]


def count(levels: Levels, codes: Int[np.ndarray, " rows"], n_bins: int) -> Counts:
    """Count one concept against all features of a dictionary.

    Parameters
    ----------
    codes
        The concept's bin on every row of the evidence, -1 where it does not apply; such rows are left out of all
        measures, ranks included.
    """
    d = levels.evidence.d_sae
    total = np.concatenate([[0], np.cumsum(np.bincount(codes[codes >= 0], minlength=n_bins))])
    above = np.zeros((d, N_LEVELS, n_bins + 1), dtype=np.float32)
    rank_sum = np.zeros((d, n_bins + 1))
    cost = levels.evidence.starts + N_LEVELS * n_bins * np.arange(d + 1)
    ends = np.unique(np.append(np.searchsorted(cost, np.arange(0, cost[-1], _BLOCK)), d))
    for first, last in pairwise(ends.tolist()):
        held, ranks = _count_block(levels, codes, np.diff(total), first, last)
        above[first:last, :, 1:] = held[:, ::-1].cumsum(1)[:, ::-1].cumsum(2)
        rank_sum[first:last, 1:] = ranks.cumsum(1)
    return Counts(above, rank_sum, total)


def _count_block(
    levels: Levels, codes: Int[np.ndarray, " rows"], rows: Int[np.ndarray, " bins"], first: int, last: int
) -> tuple[Int[np.ndarray, "features levels bins"], Float[np.ndarray, "features bins"]]:
    """Return, of features first .. last - 1, entries by level and bin, and the rows' ascending mid-ranks summed by bin.

    Parameters
    ----------
    rows
        How many rows each bin has, all of which have a rank: those on which a feature is silent tie below its entries.
    """
    evidence, n, n_bins, d = levels.evidence, int(rows.sum()), len(rows), last - first
    part = slice(evidence.starts[first], evidence.starts[last])
    bins = codes[evidence.row[part]]
    known = np.flatnonzero(bins >= 0)
    bins, value = bins[known], evidence.value[part][known]
    feature = np.repeat(np.arange(d, dtype=np.int32), evidence.count[first:last])[known]
    cell = (feature * N_LEVELS + levels.level[part][known]) * n_bins + bins
    held = np.bincount(cell, minlength=d * N_LEVELS * n_bins).reshape(d, N_LEVELS, n_bins)
    silent = rows - held.sum(1)
    firing = n - silent.sum(1)
    new = np.append(True, (np.diff(feature) != 0) | (np.diff(value) != 0))
    ties = np.flatnonzero(new[: len(known)])
    ends = np.append(ties, len(known))[1:]
    # counted from the top within the feature: a group of equal values spans places ties + 1 .. ends
    from_top = (ties + 1 + ends) / 2 - (np.cumsum(firing) - firing)[feature[ties]]
    ranks = np.repeat(n + 1 - from_top, ends - ties)
    # of no entries at all bincount makes integers
    sums = np.bincount(feature * n_bins + bins, weights=ranks, minlength=d * n_bins).astype(np.float64)
    return held, sums.reshape(d, n_bins) + silent * ((n - firing + 1) / 2)[:, None]


def average_precision(
    tp: Float[np.ndarray, "n levels"], fired: Float[np.ndarray, "n levels"], positives: np.ndarray, n: int
) -> Float[np.ndarray, " n"]:
    """Return AP = sum over thresholds of (recall step) x precision, from counts at rising thresholds.

    The rows below every threshold form one last group, whose precision is the prevalence.
    """
    falling_tp, falling_fired = tp[:, ::-1], fired[:, ::-1]
    steps = np.diff(falling_tp, axis=1, prepend=0)
    precision = falling_tp / np.maximum(falling_fired, 1)
    positives = np.maximum(positives, 1)
    found = (steps * precision).sum(1) / positives
    return np.asarray(found + (1 - falling_tp[:, -1] / positives) * positives / max(n, 1))


def skill_of(ap: np.ndarray, prevalence: np.ndarray) -> np.ndarray:
    """Return (AP - p) / (1 - p): 0 = no better than chance, 1 = perfect, comparable across prevalences."""
    usable = (prevalence > 0) & (prevalence <= MAX_PREVALENCE)
    return np.where(usable, (ap - prevalence) / np.maximum(1 - prevalence, 1e-12), -np.inf)


def supported_ranges(
    rows: Rows, codes: Int[np.ndarray, " rows"], *, n_bins: int, min_entities: int
) -> Bool[np.ndarray, "bins bins"]:
    """Return for each range of bins (first, last) whether it holds, and fails, on enough entities.

    An entity counts on a side if one of its rows is there; rows where the concept does not apply are on neither.
    """
    known = codes >= 0
    present = np.zeros((rows.n_entities, n_bins), dtype=bool)
    present[rows.member[known], codes[known]] = True
    up_to = np.logical_or.accumulate(present, axis=1)
    from_on = np.logical_or.accumulate(present[:, ::-1], axis=1)[:, ::-1]
    nobody = np.zeros((rows.n_entities, 1), dtype=bool)
    below, above = np.hstack([nobody, up_to[:, :-1]]), np.hstack([from_on[:, 1:], nobody])
    out = np.zeros((n_bins, n_bins), dtype=bool)
    for low in range(n_bins):
        holds = np.logical_or.accumulate(present[:, low:], axis=1).sum(0)
        fails = (below[:, low, None] | above[:, low:]).sum(0)
        out[low, low:] = np.minimum(holds, fails) >= min_entities
    return out


def fit_ranges(counts: Counts, supported: Bool[np.ndarray, "bins bins"], *, numeric: bool) -> Fit:
    """Return every feature's best supported range of bins; where there is none its skill is -inf.

    A yes-or-no concept's range is bin 1. For a numeric one it starts at the bin of highest skill and takes in
    whichever neighbour raises the skill more, as long as one does; a range on enough entities is preferred to any
    that is not, so that a bin of few does not win by chance.
    """
    d, _, sums = counts.above.shape
    n_bins = sums - 1
    if not numeric:
        low = np.ones(d, dtype=np.int64)
        return _measure(counts, supported, low, low)

    def worth(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.asarray(_skill(counts, low, high) - np.where(supported[low, high], 0.0, UNSUPPORTED))

    single = np.stack([worth(np.full(d, b), np.full(d, b)) for b in range(n_bins)], axis=1)
    low = single.argmax(1)
    high = low.copy()
    best = single.max(1)
    for _ in range(n_bins - 1):
        left, right = np.maximum(low - 1, 0), np.minimum(high + 1, n_bins - 1)
        skill_left = np.where(low > 0, worth(left, high), -np.inf)
        skill_right = np.where(high < n_bins - 1, worth(low, right), -np.inf)
        go_left = (skill_left > best) & (skill_left >= skill_right)
        go_right = (skill_right > best) & ~go_left
        if not (go_left | go_right).any():
            break
        low = np.where(go_left, left, low)
        high = np.where(go_right, right, high)
        best = np.where(go_left, skill_left, np.where(go_right, skill_right, best))
    return _measure(counts, supported, low, high)


def _range(counts: Counts, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives `[d, levels]`, fired `[d, levels]` and positives `[d]` of each feature's range."""
    upper = np.take_along_axis(counts.above, (high + 1)[:, None, None], axis=2)[:, :, 0]
    lower = np.take_along_axis(counts.above, low[:, None, None], axis=2)[:, :, 0]
    return upper - lower, counts.above[:, :, -1], counts.total[high + 1] - counts.total[low]


def _skill(counts: Counts, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    tp, fired, positives = _range(counts, low, high)
    n = int(counts.total[-1])
    return skill_of(average_precision(tp, fired, positives, n), positives / max(n, 1))


def _measure(counts: Counts, supported: np.ndarray, low: np.ndarray, high: np.ndarray) -> Fit:
    tp, fired, positives = _range(counts, low, high)
    n = int(counts.total[-1])
    f1 = 2 * tp / np.maximum(fired + positives[:, None], 1)
    level = f1.argmax(1)
    d = np.arange(len(low))
    rank_sum = counts.rank_sum[d, high + 1] - counts.rank_sum[d, low]
    negatives = n - positives
    area = (rank_sum - positives * (positives + 1) / 2) / np.maximum(positives * negatives, 1)
    skill = np.where(supported[low, high], _skill(counts, low, high), -np.inf)
    return Fit(low, high, skill, f1[d, level], level, area)
