"""Groups: unions of features at their frozen thresholds, for concepts that several features tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .confirm import Confirm, Detector, rates
from .discover import TargetFit
from .evidence import Evidence
from .statistics.bootstrap import Interval
from .targets import Target

N_CANDIDATES = 64
"""Features by F1 on discover from which a group grows."""


class Member(NamedTuple):
    """One detector of a group at its frozen threshold."""

    name: int
    threshold: float


class GroupMeasure(NamedTuple):
    """A union of detectors on `confirm`."""

    f1: Interval
    precision: Interval
    recall: Interval
    prevalence: float
    n_entities: int
    f1_draws: Float[np.ndarray, " draws"]


def grow(
    fires: Sequence[Int[np.ndarray, " _"]],
    holds: Bool[np.ndarray, " rows"],
    applies: Bool[np.ndarray, " rows"],
    *,
    max_size: int,
    min_gain: float,
) -> tuple[list[int], float]:
    """Return the candidates of a greedy union on discover, and its F1 there.

    Each step adds the candidate that raises F1 most, as long as it rises, and by `min_gain`; the first is always
    taken.

    Parameters
    ----------
    fires
        The rows on which each candidate fires, each once.
    """
    positives = max(int((holds & applies).sum()), 1)
    union = np.zeros(len(holds), dtype=bool)
    fresh = [rows[applies[rows]] for rows in fires]
    chosen: list[int] = []
    found, fired, best = 0, 0, 0.0
    while len(chosen) < max_size:
        found_with = found + np.array([np.count_nonzero(holds[rows]) for rows in fresh])
        fired_with = fired + np.array([len(rows) for rows in fresh])
        f1 = 2 * found_with / positives / (1 + fired_with / positives)
        i = int(f1.argmax())
        # no gain at all is none, even where none is asked for: the group would take its members again
        if chosen and (f1[i] < best + min_gain or f1[i] <= best):
            break
        chosen.append(i)
        union[fresh[i]] = True
        found, fired, best = int(found_with[i]), int(fired_with[i]), float(f1[i])
        fresh = [rows[~union[rows]] for rows in fresh]
    return chosen, best


def grow_from_features(
    evidence: Evidence,
    fit: TargetFit,
    holds: Bool[np.ndarray, " rows"],
    applies: Bool[np.ndarray, " rows"],
    *,
    max_size: int,
    min_gain: float,
) -> tuple[list[Member], float]:
    """Return the group of a dictionary's features for one target, chosen on discover."""
    top = np.argsort(-fit.f1, kind="stable")[:N_CANDIDATES]
    top = top[fit.f1[top] > 0]
    if not len(top):
        return [], 0.0
    fires = [_fired(evidence, int(j), float(fit.threshold[j])) for j in top]
    chosen, f1 = grow(fires, holds, applies, max_size=max_size, min_gain=min_gain)
    return [Member(int(top[i]), float(fit.threshold[top[i]])) for i in chosen], f1


def measure_group(
    confirm: Confirm, evidence: Evidence, members: Sequence[Member], target: Target
) -> GroupMeasure:
    """Measure a group of features on confirm."""
    rows = [_fired(evidence, m.name, m.threshold) for m in members]
    return measure_union(confirm, [Detector(r, np.ones(len(r), np.float32), 0.0) for r in rows], target)


def measure_union(confirm: Confirm, detectors: Sequence[Detector], target: Target) -> GroupMeasure:
    """Measure a union of detectors on confirm, each at its own threshold."""
    union = np.zeros(len(confirm.rows), dtype=bool)
    for detector in detectors:
        union[detector.row[detector.value > detector.threshold]] = True
    truth = confirm.truth(target)
    union &= truth.applies
    n = confirm.rows.n_entities
    fired = np.bincount(confirm.rows.member[union], minlength=n).astype(np.float64)
    hit = np.bincount(confirm.rows.member[union & truth.holds], minlength=n).astype(np.float64)
    found = rates(hit, fired, truth, confirm.weights)
    return GroupMeasure(
        f1=found.f1,
        precision=found.precision,
        recall=found.recall,
        prevalence=float(truth.positives.sum() / max(truth.rows.sum(), 1)),
        n_entities=int((truth.positives > 0).sum()),
        f1_draws=found.f1_draws.astype(np.float32),
    )


def _fired(evidence: Evidence, feature: int, threshold: float) -> Int[np.ndarray, " n"]:
    row, value = evidence.of(feature)
    return row[value > threshold]
