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
    firing: Bool[np.ndarray, "candidates rows"],
    holds: Bool[np.ndarray, " rows"],
    applies: Bool[np.ndarray, " rows"],
    *,
    max_size: int,
    min_gain: float,
) -> tuple[list[int], float]:
    """Return the candidates of a greedy union on discover, and its F1 there.

    Each step adds the candidate that raises F1 most, as long as it rises, and by `min_gain`; the first is always
    taken.
    """
    positives = int((holds & applies).sum())
    active = firing & applies
    union = np.zeros(firing.shape[1], dtype=bool)
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < max_size:
        fresh = active & ~union
        tp = (union & holds).sum() + (fresh & holds).sum(1)
        f1 = 2 * tp / max(positives, 1) / (1 + (union.sum() + fresh.sum(1)) / max(positives, 1))
        i = int(f1.argmax())
        # no gain at all is none, even where none is asked for: the group would take its members again
        if chosen and (f1[i] < best + min_gain or f1[i] <= best):
            break
        chosen.append(i)
        union |= active[i]
        best = float(f1[i])
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
    firing = np.zeros((len(top), len(evidence.rows)), dtype=bool)
    for i, j in enumerate(top):
        firing[i, _fired(evidence, int(j), float(fit.threshold[j]))] = True
    chosen, f1 = grow(firing, holds, applies, max_size=max_size, min_gain=min_gain)
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
