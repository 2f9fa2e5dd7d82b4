"""What a concept is worth without the model: the best raw column, and the untrained twin's best features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .confirm import Detector
from .discover import against_target
from .intervals import written_ends
from .statistics.counts import MAX_PREVALENCE, Counts, Levels, count, fit_ranges, supported_ranges
from .targets import Coded, Target

Shape = Literal["rising", "falling", "interval", "near", "missing"]
_N_EDGES = 32
_TAILS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the rows on which a target holds that an interval of it may leave out on either side."""


class ColumnDetector(NamedTuple):
    """A raw column at t read as a detector.

    Its value, its negative, whether it lies in an interval, how near it is to an interval's middle, or whether it is
    missing.
    """

    column: str
    shape: Shape
    low: float
    high: float
    """Bounds of the interval, both included; unused where the shape has none."""
    skill: float
    """On discover, which chose it."""

    def describe(self) -> str:
        """Return it in words."""
        if self.shape in ("interval", "near"):
            where = "in" if self.shape == "interval" else "near the middle of"
            return f"{self.column} {where} [{', '.join(written_ends(self.low, self.high))}]"
        words = {"rising": "high", "falling": "low", "missing": "missing"}
        return f"{words[self.shape]} {self.column}"

    def on(self, values: Float[np.ndarray, " rows"]) -> Detector:
        """Return the detector on rows; missing values tie below all others, but where they are what it finds."""
        known = np.isfinite(values)
        if self.shape in ("interval", "missing"):
            inside = known & (values >= self.low) & (values <= self.high)
            row = np.flatnonzero(inside if self.shape == "interval" else ~known)
            return Detector(row, np.ones(len(row), dtype=np.float32), 0.0)
        row = np.flatnonzero(known)
        signed = values[row] if self.shape == "rising" else -values[row]
        if self.shape == "near":
            signed = -self.distance(values[row])
        order = np.argsort(-signed, kind="stable")
        return Detector(row[order], signed[order], np.inf)

    def distance(self, values: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """Return how far values lie from the middle of the interval."""
        return np.asarray(np.abs(values - (self.low + self.high) / 2))


def best_columns(
    names: Sequence[str],
    values: Float[np.ndarray, "rows columns"],
    concepts: Mapping[str, Coded],
    targets: Sequence[Target],
) -> dict[Target, ColumnDetector]:
    """Return, per target, the raw column that finds it best on `discover`: any column, in any shape.

    An interval's ends are quantiles of the column, or of the column where the target holds, which has an interval of
    the column itself among them. Nearness is tried to the middle of the target's best interval within a column: a
    feature is graded, so one that restates a column would exceed any interval of it where the target is less sharp.

    Parameters
    ----------
    names, values
        The columns, and their values on the rows of discover (NaN = missing).
    """
    sought = {
        name: _Sought.of(concepts[name], [t for t in targets if t.concept == name])
        for name in dict.fromkeys(t.concept for t in targets)
    }
    best: dict[Target, ColumnDetector] = {}
    intervals: dict[Target, tuple[int, ColumnDetector]] = {}

    def offer(target: Target, detector: ColumnDetector) -> None:
        if target not in best or detector.skill > best[target].skill:
            best[target] = detector

    for i, name in enumerate(names):
        column = _Sorted.of(values[:, i])
        if not len(column.order):
            continue
        for concept in sought.values():
            for target, truth in _truths(column, concept, concept.positives):
                offer(target, ColumnDetector(name, "rising", 0.0, 0.0, _graded(column, truth, rising=True)))
                offer(target, ColumnDetector(name, "falling", 0.0, 0.0, _graded(column, truth, rising=False)))
                if len(column.order) < len(values):
                    offer(target, ColumnDetector(name, "missing", 0.0, 0.0, truth.skill_of_missing()))
                if len(truth.at):
                    interval = ColumnDetector(name, "interval", *_best_interval(column, truth))
                    offer(target, interval)
                    inside = column.value[0] < interval.low and interval.high < column.value[-1]
                    if inside and (target not in intervals or interval.skill > intervals[target][1].skill):
                        intervals[target] = i, interval
    for target, (i, interval) in intervals.items():
        column = _Sorted.of(interval.distance(values[:, i]))
        for _, truth in _truths(column, sought[target.concept], [target]):
            offer(target, interval._replace(shape="near", skill=_graded(column, truth, rising=False)))
    return best


class _Sorted(NamedTuple):
    """A signal on the rows where it is known, smallest first."""

    order: Int[np.ndarray, " known"]
    value: Float[np.ndarray, " known"]
    group: Int[np.ndarray, " known"]
    """Number of its value among the distinct ones."""
    starts: Int[np.ndarray, " bounds"]
    """Where each distinct value begins, and the number of rows."""
    edges: Float[np.ndarray, " edges"]
    """Quantiles, or all distinct values where they are few."""

    @staticmethod
    def of(signal: Float[np.ndarray, " rows"]) -> _Sorted:
        """Sort a signal, equal values in any order; NaN = not known."""
        known = np.flatnonzero(np.isfinite(signal))
        order = known[np.argsort(signal[known])]
        value = signal[order]
        new = np.append(True, np.diff(value) != 0)[: len(value)]
        starts = np.flatnonzero(new)
        edges = value[starts]
        if len(edges) > _N_EDGES:
            edges = np.unique(np.quantile(value, np.linspace(0, 1, _N_EDGES + 1), method="nearest"))
        return _Sorted(order, value, np.cumsum(new) - 1, np.append(starts, len(value)), edges)


class _Sought(NamedTuple):
    """A concept on discover with its targets, but for those that hold nowhere or almost everywhere."""

    codes: Int[np.ndarray, " rows"]
    positives: dict[Target, int]
    """Rows where each target holds."""
    n: int
    """Rows to which the concept applies."""

    @staticmethod
    def of(concept: Coded, targets: Sequence[Target]) -> _Sought:
        """Count where the targets hold."""
        codes = concept.codes["discover"]
        bins = np.bincount(codes[codes >= 0], minlength=concept.n_bins)
        n = int(bins.sum())
        positives = {t: int(bins[t.low : t.high + 1].sum()) for t in targets}
        return _Sought(codes, {t: p for t, p in positives.items() if p and p / n <= MAX_PREVALENCE}, n)


class _Truth(NamedTuple):
    """One target on the rows where a signal is known, smallest signal first."""

    at: Int[np.ndarray, " positives"]
    """Places where it holds."""
    applied: Int[np.ndarray, " bounds"]
    """Rows to which it applies before each place, and in all."""
    positives: int
    n: int
    """Rows where it holds, and to which it applies, known or not."""

    def skill(self, gained: np.ndarray | float, hits: np.ndarray | int) -> np.ndarray:
        """Return skill from the sum of recall step x precision over all that fires, with `hits`; the rest ties below."""
        p = self.positives / self.n
        ap = gained + (1 - hits / self.positives) * p
        return np.asarray((ap - p) / (1 - p))

    def skill_of_missing(self) -> float:
        """Return the skill of firing where the signal is not known."""
        hits, fired = self.positives - len(self.at), self.n - int(self.applied[-1])
        return float(self.skill(hits / self.positives * hits / max(fired, 1), hits))


def _truths(column: _Sorted, concept: _Sought, targets: Iterable[Target]) -> Iterator[tuple[Target, _Truth]]:
    """Yield targets of a concept on the rows where a column is known."""
    placed = concept.codes[column.order]
    applied = np.append(0, np.cumsum(placed >= 0))
    for target in targets:
        at = np.flatnonzero((placed >= target.low) & (placed <= target.high))
        yield target, _Truth(at, applied, concept.positives[target], concept.n)


def _graded(column: _Sorted, truth: _Truth, *, rising: bool) -> float:
    """Return the skill of the signal itself (`rising`), or of its negative."""
    group = column.group[truth.at]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    group, steps = group[first], np.diff(first, append=len(group))
    if rising:
        group, steps = group[::-1], steps[::-1]
        fired = truth.applied[-1] - truth.applied[column.starts[group]]
    else:
        fired = truth.applied[column.starts[group + 1]]
    # only where a target holds does recall step
    gained = (steps * np.cumsum(steps) / fired).sum() / truth.positives
    return float(truth.skill(gained, len(truth.at)))


def _best_interval(column: _Sorted, truth: _Truth) -> tuple[float, float, float]:
    """Return the bounds, both included, and the skill of the interval that finds a target best."""
    tails = [*_TAILS, *(1 - share for share in _TAILS)]
    ends = np.union1d(column.edges, np.quantile(column.value[truth.at], tails, method="nearest"))
    first, last = (np.searchsorted(column.value, ends, side=side) for side in ("left", "right"))
    found = [np.searchsorted(truth.at, place) for place in (first, last)]
    i, j = np.triu_indices(len(ends))
    hits = found[1][j] - found[0][i]
    fired = truth.applied[last[j]] - truth.applied[first[i]]
    skill = truth.skill(hits / truth.positives * hits / np.maximum(fired, 1), hits)
    best = int(skill.argmax())
    # half way to the neighbours, since the target ends somewhere between
    low, high, value = first[i[best]], last[j[best]], column.value
    below, above = value[max(low - 1, 0)], value[min(high, len(value) - 1)]
    return float((below + value[low]) / 2), float((value[high - 1] + above) / 2), float(skill[best])


class TwinFeature(NamedTuple):
    """A feature of the untrained twin with the target that it is measured on, chosen on discover."""

    feature: int
    target: Target
    threshold: float
    skill: float


def best_twin_features(
    levels: Levels, concepts: Mapping[str, Coded], targets: Sequence[Target], *, min_entities: int
) -> dict[Target, list[TwinFeature]]:
    """Return, per target, the features of another dictionary over the same rows that find it best on `discover`.

    The first finds the target itself best. A range of a numeric concept was chosen for the feature that it labels, and
    a dictionary that tiles the concept otherwise would lose on it, so a second one is the best on a range of its own.
    For a target between two values that one is too, since ranges open on a side are found more easily.

    Parameters
    ----------
    min_entities
        Entities that a range of its own needs on either side, as where features are screened.
    """
    best: dict[Target, list[TwinFeature]] = {}
    for name in dict.fromkeys(t.concept for t in targets):
        concept = concepts[name]
        counts = count(levels, concept.codes["discover"], concept.n_bins)
        of_any, of_middle = _own_ranges(levels, counts, concept, min_entities=min_entities)
        for target in targets:
            if target.concept == name:
                fit = against_target(levels, counts, target)
                j = int(fit.skill.argmax())
                best[target] = [TwinFeature(j, target, float(fit.threshold[j]), float(fit.skill[j]))]
                is_open = None in concept.bounds(target)
                best[target] += of_any if is_open else of_middle
    return best


def _own_ranges(
    levels: Levels, counts: Counts, concept: Coded, *, min_entities: int
) -> tuple[list[TwinFeature], list[TwinFeature]]:
    """Return the feature that is best on a range of its own, of any and of those between two values; or none."""
    if concept.edges is None:
        return [], []
    supported = supported_ranges(
        levels.evidence.rows, concept.codes["discover"], n_bins=concept.n_bins, min_entities=min_entities
    )
    fit = fit_ranges(counts, supported, numeric=True)

    def best(skill: np.ndarray) -> list[TwinFeature]:
        j = int(skill.argmax())
        if not np.isfinite(skill[j]):
            return []
        target = Target(concept.id, int(fit.low[j]), int(fit.high[j]))
        return [TwinFeature(j, target, float(levels.thresholds[j, fit.level[j]]), float(skill[j]))]

    is_open = (fit.low == 0) | (fit.high == concept.n_bins - 1)
    return best(fit.skill), best(np.where(is_open, -np.inf, fit.skill))
