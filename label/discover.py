"""Finding candidates: every feature against every concept on `discover`, and nothing but `discover`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .evidence import Rows
from .statistics.counts import (
    MAX_PREVALENCE,
    Counts,
    Levels,
    average_precision,
    count,
    fit_ranges,
    skill_of,
    supported_ranges,
)
from .targets import Coded, Target


class Pair(NamedTuple):
    """One feature with one target, as `discover` saw it; its threshold is frozen here."""

    feature: int
    target: Target
    threshold: float
    """In raw activation units; the feature fires where its activation is strictly above."""
    auroc: float
    skill: float
    f1: float
    rank: int
    """Place among the feature's concepts by skill, from 0; -1 where only the concept asked for it."""


@dataclass(frozen=True)
class Screen:
    """Every feature's best range of every concept; arrays are `[concepts, d_sae]`."""

    concepts: list[Coded]
    thresholds: Float[np.ndarray, "d_sae levels"]
    low: Int[np.ndarray, "concepts d_sae"]
    high: Int[np.ndarray, "concepts d_sae"]
    skill: Float[np.ndarray, "concepts d_sae"]
    f1: Float[np.ndarray, "concepts d_sae"]
    level: Int[np.ndarray, "concepts d_sae"]
    auroc: Float[np.ndarray, "concepts d_sae"]

    def pair(self, concept: int, feature: int, rank: int) -> Pair:
        """Return one cell as a pair."""
        at = (concept, feature)
        return Pair(
            feature,
            Target(self.concepts[concept].id, int(self.low[at]), int(self.high[at])),
            float(self.thresholds[feature, self.level[at]]),
            float(self.auroc[at]),
            float(self.skill[at]),
            float(self.f1[at]),
            rank,
        )


def screen(
    levels: Levels,
    concepts: Sequence[Coded],
    *,
    min_entities: int,
    report: Callable[[int], None] = lambda _: None,
) -> Screen:
    """Compare every feature with every concept on `discover`.

    Parameters
    ----------
    min_entities
        Entities that a target needs on either side there, as it will on confirm.
    """
    fits = []
    for i, concept in enumerate(concepts):
        codes, n_bins = concept.codes["discover"], concept.n_bins
        supported = supported_ranges(levels.evidence.rows, codes, n_bins=n_bins, min_entities=min_entities)
        counts = count(levels, codes, n_bins)
        fits.append(fit_ranges(counts, supported, numeric=concept.edges is not None))
        report(i + 1)
    stacked = [np.stack([f[i] for f in fits]) for i in range(6)]
    low, high, skill, f1, level, auroc = stacked
    return Screen(list(concepts), levels.thresholds, low, high, skill, f1, level, auroc)


def why_unscreened(rows: Rows, concept: Coded, *, min_entities: int) -> str:
    """Return why `screen` compared a concept with no feature."""
    if concept.edges is not None:
        # a feature's range grows from a bin, so there may be one that none came to
        return (
            "no range of it was found that holds, and fails, on enough entities of discover and holds on at most "
            f"{MAX_PREVALENCE:.0%} of the rows there to which it applies"
        )
    codes = concept.codes["discover"]
    if not supported_ranges(rows, codes, n_bins=concept.n_bins, min_entities=min_entities).any():
        return "it holds, or fails, on too few entities of discover"
    return f"it holds on more than {MAX_PREVALENCE:.0%} of the rows of discover to which it applies"


def best_of_features(
    screened: Screen, rows: Sequence[int], *, n_best: int, min_skill: float, min_auroc: float
) -> list[Pair]:
    """Return each feature's best concepts among the given rows of the screen, by skill."""
    if not len(rows):
        return []
    part = np.asarray(rows, dtype=np.int64)
    skill = np.where(screened.auroc[part] >= min_auroc, screened.skill[part], -np.inf)
    order = np.argsort(-skill, axis=0, kind="stable")[:n_best]
    return [
        screened.pair(int(rows[c]), feature, rank)
        for feature in range(skill.shape[1])
        for rank, c in enumerate(order[:, feature])
        if skill[c, feature] >= min_skill
    ]


def best_of_concepts(screened: Screen, rows: Sequence[int]) -> dict[str, Pair]:
    """Return each concept's best feature by skill; those that hold on too few entities, or almost always, have none."""
    best = {}
    for c in rows:
        feature = int(screened.skill[c].argmax())
        if np.isfinite(screened.skill[c, feature]):
            best[screened.concepts[c].id] = screened.pair(int(c), feature, -1)
    return best


class TargetFit(NamedTuple):
    """Every feature against one given target; arrays are `[d_sae]`."""

    skill: Float[np.ndarray, " d_sae"]
    f1: Float[np.ndarray, " d_sae"]
    threshold: Float[np.ndarray, " d_sae"]
    """Of the best F1."""


def against_target(levels: Levels, counts: Counts, target: Target) -> TargetFit:
    """Return how well each feature finds one given target on `discover`."""
    tp = counts.above[:, :, target.high + 1] - counts.above[:, :, target.low]
    fired = counts.above[:, :, -1]
    n = int(counts.total[-1])
    positives = int(counts.total[target.high + 1] - counts.total[target.low])
    d = len(tp)
    ap = average_precision(tp, fired, np.full(d, positives), n)
    f1 = 2 * tp / np.maximum(fired + positives, 1)
    level = f1.argmax(1)
    at = np.arange(d)
    skill = skill_of(ap, np.full(d, positives / max(n, 1)))
    return TargetFit(skill, f1[at, level], levels.thresholds[at, level])
