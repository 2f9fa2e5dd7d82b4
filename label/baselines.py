"""What a concept is worth without the model: the best raw column, and the untrained twin's best feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .confirm import Detector
from .discover import against_target
from .intervals import written_ends
from .statistics.counts import MAX_PREVALENCE, Levels, count
from .targets import Coded, Target

Shape = Literal["rising", "falling", "interval"]
_N_EDGES = 32
_TAILS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the rows on which a target holds that an interval of it may leave out on either side."""
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
            return f"{self.column} in [{', '.join(written_ends(self.low, self.high))}]"
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
    """Return, per target, the raw column that finds it best on `discover`: any column, either sign, an interval.

    An interval's ends are quantiles of the column, or of the column where the target holds, which has an interval of
    the column itself among them.

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
    intervals = _best_intervals(column[order], holds[order], applies[order], positives, n)
    out += [
        (ColumnDetector(name, "interval", *interval), t)
        for t, interval, use in zip(targets, intervals, usable, strict=True)
        if use
    ]
    return out


def _best_intervals(
    column: Float[np.ndarray, " rows"],
    holds: Bool[np.ndarray, "rows t"],
    applies: Bool[np.ndarray, "rows t"],
    positives: Int[np.ndarray, " t"],
    n: Int[np.ndarray, " t"],
) -> list[tuple[float, float, float]]:
    """Return, per target, the bounds, both included, and the skill of its best interval; the column is ascending."""
    zero = np.zeros((1, holds.shape[1]), dtype=np.int64)
    found, fired = (np.concatenate([zero, np.cumsum(x, axis=0)]) for x in (holds, applies))
    shares = np.linspace(0, 1, _N_EDGES + 1)
    values = np.unique(column)
    if len(values) > _N_EDGES:
        values = np.unique(np.quantile(column, shares, method="nearest"))
    out, m = [], len(column) - 1
    for t, total in enumerate(positives.tolist()):
        own = column[holds[:, t]]
        if not len(own):
            out.append((0.0, 0.0, 0.0))
            continue
        tails = np.quantile(own, [*_TAILS, *(1 - share for share in _TAILS)], method="nearest")
        ends = np.union1d(values, tails)
        first, last = (np.searchsorted(column, ends, side=side) for side in ("left", "right"))
        i, j = np.triu_indices(len(ends))
        hits, fires = found[last[j], t] - found[first[i], t], fired[last[j], t] - fired[first[i], t]
        recall, p = hits / total, total / n[t]
        ap = recall * hits / np.maximum(fires, 1) + (1 - recall) * p
        skill = (ap - p) / max(1 - p, 1e-12)
        best = int(skill.argmax())
        # half way to the neighbours, since the target ends somewhere between
        low, high = first[i[best]], last[j[best]]
        bounds = (column[max(low - 1, 0)] + column[low]) / 2, (column[high - 1] + column[min(high, m)]) / 2
        out.append((float(bounds[0]), float(bounds[1]), float(skill[best])))
    return out


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
