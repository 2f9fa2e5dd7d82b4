"""Measuring what was found: each pair once, on `confirm`, with intervals by entity and an entity-clustered test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from .discover import Pair
from .evidence import Evidence, Rows
from .statistics.bootstrap import Interval, ap_draws, interval
from .statistics.score_test import EntitySums, score_statistic
from .targets import Coded, Target

_ENTITIES = 4096
"""Whose weights are turned to single precision at once: 16 MiB of 1,000 samples."""


class Measure(NamedTuple):
    """What `confirm` says of one detector and one target."""

    prevalence: float
    ap: Interval
    skill: Interval
    lift: Interval
    f1: Interval
    precision: Interval
    recall: Interval
    n_entities: int
    """Entities with a row where the target holds."""
    n_entities_without: int
    """Entities with a row where it applies and does not hold."""
    n_entities_firing: int
    """Entities with a row where the detector is above its threshold."""
    statistic: float
    """Entity-clustered score statistic, standard normal without association."""
    skill_draws: Float[np.ndarray, " draws"]
    """Skill in every bootstrap sample, for paired differences."""


class Truth(NamedTuple):
    """One target on the rows of a split, with the sums that every detector shares."""

    holds: Bool[np.ndarray, " rows"]
    applies: Bool[np.ndarray, " rows"]
    positives: Float[np.ndarray, " n_entities"]
    rows: Float[np.ndarray, " n_entities"]
    positives_draws: Float[np.ndarray, " draws"]
    rows_draws: Float[np.ndarray, " draws"]


class Detector(NamedTuple):
    """A graded signal where it is positive, largest first; rows not listed tie below."""

    row: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    threshold: float


class Confirm:
    """The confirm split's rows and bootstrap weights; measures detectors against targets."""

    def __init__(
        self,
        rows: Rows,
        concepts: Mapping[str, Coded],
        weights: UInt8[np.ndarray, "n_entities draws"],
        *,
        split: str = "confirm",
    ) -> None:
        self.rows, self.concepts, self.weights, self.split = rows, concepts, weights, split
        self._truths: dict[Target, Truth] = {}

    def truth(self, target: Target) -> Truth:
        """Return the target on this split, kept for the next detector."""
        if target not in self._truths:
            holds, applies = self.concepts[target.concept].truth(self.split, target)
            positives = self._per_entity(holds)
            rows = self._per_entity(applies)
            if len(self._truths) > 256:
                self._truths.clear()
            drawn = resampled(self.weights, positives, rows)
            self._truths[target] = Truth(holds, applies, positives, rows, drawn[0], drawn[1])
        return self._truths[target]

    def measure(self, detector: Detector, target: Target) -> Measure:
        """Measure one detector against one target on the rows where the target applies."""
        truth = self.truth(target)
        applies = truth.applies[detector.row]
        row, value = detector.row[applies], detector.value[applies]
        member, holds = self.rows.member[row], truth.holds[row]
        firing = value > detector.threshold
        fired = np.bincount(member[firing], minlength=self.rows.n_entities).astype(np.float64)
        hit = np.bincount(member[firing & holds], minlength=self.rows.n_entities).astype(np.float64)
        n, positives = truth.rows.sum(), truth.positives.sum()
        ones = np.ones((self.rows.n_entities, 1), dtype=np.uint8)
        ap = float(ap_draws(value, member, holds, np.array([positives]), np.array([n]), ones)[0])
        draws = ap_draws(value, member, holds, truth.positives_draws, truth.rows_draws, self.weights)
        p = positives / max(n, 1)
        p_draws = truth.positives_draws / np.maximum(truth.rows_draws, 1)
        skill_draws = (draws - p_draws) / np.maximum(1 - p_draws, 1e-12)
        found = rates(hit, fired, truth, self.weights)
        return Measure(
            prevalence=float(p),
            ap=interval(ap, draws),
            skill=interval((ap - p) / max(1 - p, 1e-12), skill_draws),
            lift=interval(ap / max(p, 1e-12), draws / np.maximum(p_draws, 1e-12)),
            f1=found.f1,
            precision=found.precision,
            recall=found.recall,
            n_entities=int((truth.positives > 0).sum()),
            n_entities_without=int((truth.rows > truth.positives).sum()),
            n_entities_firing=int((fired > 0).sum()),
            statistic=score_statistic(EntitySums(hit, fired, truth.positives, truth.rows)),
            skill_draws=skill_draws.astype(np.float32),
        )

    def _per_entity(self, mask: np.ndarray) -> np.ndarray:
        return np.bincount(self.rows.member[mask], minlength=self.rows.n_entities).astype(np.float64)


def resampled(
    weights: UInt8[np.ndarray, "n_entities draws"], *sums: Float[np.ndarray, " n_entities"]
) -> Float[np.ndarray, "sums draws"]:
    """Return each sum over entities in every bootstrap sample."""
    each = np.stack(sums)
    drawn = np.zeros((len(sums), weights.shape[1]))
    # most detectors fire on few entities; a product in single precision is exact up to 2^24 rows
    some = np.flatnonzero(each.any(axis=0))
    for at in range(0, len(some), _ENTITIES):
        part = some[at : at + _ENTITIES]
        drawn += each[:, part].astype(np.float32) @ weights[part].astype(np.float32)
    return drawn


def detector_of(evidence: Evidence, pair: Pair) -> Detector:
    """Return a feature as a detector at its frozen threshold."""
    row, value = evidence.of(pair.feature)
    return Detector(row, value, pair.threshold)


def measure_pairs(
    confirm: Confirm,
    evidence: Evidence,
    pairs: Sequence[Pair],
    *,
    report: Callable[[int], None] = lambda _: None,
) -> list[Measure]:
    """Measure every pair once."""
    out = []
    for i, pair in enumerate(pairs):
        out.append(confirm.measure(detector_of(evidence, pair), pair.target))
        report(i + 1)
    return out


class Rates(NamedTuple):
    """How the rows on which a detector fires agree with those of its target."""

    f1: Interval
    precision: Interval
    recall: Interval
    f1_draws: Float[np.ndarray, " draws"]
    """NaN in samples where it is not defined."""


def rates(
    hit: Float[np.ndarray, " n_entities"],
    fired: Float[np.ndarray, " n_entities"],
    truth: Truth,
    weights: UInt8[np.ndarray, "n_entities draws"],
) -> Rates:
    """Return F1, precision and recall from an entity's rows: those hit, and those fired on.

    Samples in which a rate is not defined, 0 of 0, do not count for its interval.
    """
    tp, n_fired, positives = hit.sum(), fired.sum(), truth.positives.sum()
    tp_draws, fired_draws = resampled(weights, hit, fired)

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(np.where(b > 0, a / np.maximum(b, 1e-12), np.nan))

    f1_draws = ratio(2 * tp_draws, fired_draws + truth.positives_draws)
    return Rates(
        f1=interval(float(2 * tp / max(n_fired + positives, 1)), f1_draws),
        precision=interval(float(tp / n_fired) if n_fired else 0.0, ratio(tp_draws, fired_draws)),
        recall=interval(float(tp / positives) if positives else 0.0, ratio(tp_draws, truth.positives_draws)),
        f1_draws=f1_draws,
    )
