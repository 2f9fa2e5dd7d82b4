"""What a concept is worth without the model: the best raw column, and the untrained twin's best feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .confirm import Detector
from .discover import against_target
from .statistics.counts import MAX_PREVALENCE, Levels, count
from .targets import Coded, Target

Shape = Literal["rising", "falling", "interval"]
_N_EDGES = 32
_CHUNK = 32


class ColumnDetector(NamedTuple):
    """A raw column at t read as a detector: its value, its negative, or whether it lies in an interval."""

    column: str
    shape: Shape
    low: float
    high: float
    """Bounds of the interval, both included; unused for the other shapes."""
    skill: float
    """On discover, which chose it."""

    def describe(self) -> str:
        """Return it in words."""
        if self.shape == "interval":
            return f"{self.column} in [{self.low:.4g}, {self.high:.4g}]"
        return f"{'high' if self.shape == 'rising' else 'low'} {self.column}"

    def on(self, values: Float[np.ndarray, " rows"]) -> Detector:
        """Return the detector on rows; missing values never fire and tie below all others."""
        known = np.isfinite(values)
        if self.shape == "interval":
            row = np.flatnonzero(known & (values >= self.low) & (values <= self.high))
            return Detector(row, np.ones(len(row), dtype=np.float32), 0.0)
        row = np.flatnonzero(known)
        signed = values[row] if self.shape == "rising" else -values[row]
        order = np.argsort(-signed, kind="stable")
        return Detector(row[order], signed[order], np.inf)


def best_columns(
    names: Sequence[str],
    values: Float[np.ndarray, "rows columns"],
    truths: Mapping[Target, tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]],
) -> dict[Target, ColumnDetector]:
    """Return, per target, the raw column that finds it best on `discover`: any column, either sign, any interval.

    Parameters
    ----------
    names, values
        The columns, and their values on the rows of discover (NaN = missing).
    truths
        Per target, where it holds and where it applies.
    """
    targets = list(truths)
    best: dict[Target, ColumnDetector] = {}
    for start in range(0, len(targets), _CHUNK):
        chunk = targets[start : start + _CHUNK]
        holds = np.stack([truths[t][0] for t in chunk], axis=1)
        applies = np.stack([truths[t][1] for t in chunk], axis=1)
        for i, name in enumerate(names):
            for detector, target in _column_detectors(name, values[:, i], holds, applies, chunk):
                if target not in best or detector.skill > best[target].skill:
                    best[target] = detector
    return best


def _column_detectors(
    name: str, column: np.ndarray, holds: np.ndarray, applies: np.ndarray, targets: Sequence[Target]
) -> list[tuple[ColumnDetector, Target]]:
    known = np.flatnonzero(np.isfinite(column))
    if not len(known):
        return []
    n, positives = applies.sum(0), holds.sum(0)
    p = positives / np.maximum(n, 1)
    usable = (positives > 0) & (p <= MAX_PREVALENCE)
    order = known[np.argsort(column[known], kind="stable")]
    out: list[tuple[ColumnDetector, Target]] = []
    for shape, ranked in (("rising", order[::-1]), ("falling", order)):
        ends = np.flatnonzero(np.diff(column[ranked], append=np.nan) != 0)
        found = np.cumsum(holds[ranked], axis=0)[ends]
        fired = np.cumsum(applies[ranked], axis=0)[ends]
        steps = np.diff(found, axis=0, prepend=0)
        ap = (steps * found / np.maximum(fired, 1)).sum(0) / np.maximum(positives, 1)
        ap += (1 - found[-1] / np.maximum(positives, 1)) * p
        skill = (ap - p) / np.maximum(1 - p, 1e-12)
        out += [
            (ColumnDetector(name, shape, 0.0, 0.0, float(skill[i])), t)  # type: ignore[arg-type]
            for i, t in enumerate(targets)
            if usable[i]
        ]
    low, high, skill = _best_interval(column[known], holds[known], applies[known], positives, n)
    out += [
        (ColumnDetector(name, "interval", float(low[i]), float(high[i]), float(skill[i])), t)
        for i, t in enumerate(targets)
        if usable[i]
    ]
    return out


def _best_interval(
    column: np.ndarray,
    holds: np.ndarray,
    applies: np.ndarray,
    positives: Int[np.ndarray, " t"],
    n: Int[np.ndarray, " t"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, per target, the bounds and skill of the best interval whose ends are quantiles or distinct values."""
    distinct = np.unique(column)
    lower = (
        distinct
        if len(distinct) <= _N_EDGES
        else np.unique(np.quantile(column, np.linspace(0, 1, _N_EDGES + 1)[:-1], method="nearest"))
    )
    bins = np.searchsorted(lower, column, side="right") - 1
    b, t = len(lower), holds.shape[1]
    hit = np.zeros((b + 1, t))
    fire = np.zeros((b + 1, t))
    np.add.at(hit, bins + 1, holds)
    np.add.at(fire, bins + 1, applies)
    hit, fire = hit.cumsum(0), fire.cumsum(0)
    i, j = np.triu_indices(b)
    found, fired = hit[j + 1] - hit[i], fire[j + 1] - fire[i]
    p = positives / np.maximum(n, 1)
    recall = found / np.maximum(positives, 1)
    ap = recall * found / np.maximum(fired, 1) + (1 - recall) * p
    skill = (ap - p) / np.maximum(1 - p, 1e-12)
    top = skill.argmax(0)
    # the interval ends just before the next bin begins, that is at the largest value seen inside it
    upper = np.array([column[bins == k].max() for k in range(b)])
    return lower[i[top]], upper[j[top]], skill[top, np.arange(t)]


class TwinFeature(NamedTuple):
    """The untrained twin's best feature for a target, chosen on discover."""

    feature: int
    threshold: float
    skill: float


def best_twin_features(
    levels: Levels, concepts: Mapping[str, Coded], targets: Sequence[Target]
) -> dict[Target, TwinFeature]:
    """Return, per target, the feature of another dictionary over the same rows that finds it best on `discover`."""
    best = {}
    for name in dict.fromkeys(t.concept for t in targets):
        concept = concepts[name]
        counts = count(levels, concept.codes["discover"], concept.n_bins)
        for target in targets:
            if target.concept == name:
                fit = against_target(levels, counts, target)
                j = int(fit.skill.argmax())
                best[target] = TwinFeature(j, float(fit.threshold[j]), float(fit.skill[j]))
    return best
