"""The score test's statistic of every pair when whole trajectories of the concept belong to other entities.

What features and concepts owe to the calendar survives such a permutation, so a pair is compared with its own permutations:
months that are late in December fire and hold together in every one of them, and say nothing about the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from .confirm import detector_of
from .discover import Pair
from .evidence import Evidence
from .statistics.score_test import ROUNDING, Null
from .targets import Coded, permute_trajectories

_BYTES_OF_SOURCES = 256 << 20
"""Of permutations held at once."""


def permuted_statistics(
    evidence: Evidence,
    concepts: Mapping[str, Coded],
    pairs: Sequence[Pair],
    *,
    n_permutations: int,
    seed: int,
    report: Callable[[int], None] = lambda _: None,
) -> Null:
    """Compute the statistic of every pair in every permutation; in each all concepts move together.

    Parameters
    ----------
    evidence
        The split's codes.
    concepts
        By id, coded on that split.
    pairs
        What is tested.
    report
        Called with the number of permutations done.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 4])))
    of_concept: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        of_concept.setdefault(pair.target.concept, []).append(i)
    statistics, kept = np.zeros((n_permutations, len(pairs))), np.zeros(len(pairs))
    # what one concept's test is laid out in takes more than anything else here, so there is one at a time
    at_once = max(1, _BYTES_OF_SOURCES // (4 * len(evidence.rows)))
    for first in range(0, n_permutations, at_once):
        some = range(first, min(first + at_once, n_permutations))
        sources = [permute_trajectories(evidence.rows, rng).astype(np.int32) for _ in some]
        for number, (concept, which) in enumerate(of_concept.items()):
            test = _ConceptTest(evidence, concepts[concept], pairs, np.array(which))
            for b, source in zip(some, sources, strict=True):
                statistics[b, which], share = test.under(source)
                kept[which] += share / n_permutations
            report(first + len(some) * (number + 1) // len(of_concept))
    return Null(statistics, kept)


class _ConceptTest:
    """All pairs of one concept, laid out so that a permutation is a few passes over the rows on which they fire.

    Parameters
    ----------
    evidence, concept
        The split's codes, and the concept on it.
    pairs, which
        All pairs, and the numbers of those that name this concept.
    """

    def __init__(self, evidence: Evidence, concept: Coded, pairs: Sequence[Pair], which: np.ndarray) -> None:
        self.which, self._rows, self._bins = which, evidence.rows, concept.n_bins
        # a row without a donor, -1, finds the last code
        self._codes = np.append(concept.codes[evidence.rows.split], np.int8(-1)).astype(np.int8)
        self._known = int((self._codes >= 0).sum())
        targets = list(dict.fromkeys(pairs[i].target for i in which))
        self._low, self._high = (np.array([t[end] for t in targets]) for end in (1, 2))
        fired = [_fired(evidence, pairs[i]) for i in which]
        lengths = np.array([len(rows) for rows in fired])
        self._live = np.flatnonzero(lengths)
        self._target = np.array([targets.index(pairs[i].target) for i in which])[self._live]
        self._row: Int[np.ndarray, " entries"] = np.concatenate(fired).astype(np.int32)
        of_row = np.repeat(np.arange(len(self._live)), lengths[self._live])
        member = evidence.rows.member[self._row]
        # a stretch is what one pair's feature fires on of one entity
        self._stretch = np.flatnonzero(
            (np.diff(of_row, prepend=-1) != 0) | (np.diff(member, prepend=-1) != 0)
        )
        self._pair, self._member = of_row[self._stretch], member[self._stretch]
        self._first = np.flatnonzero(np.diff(self._pair, prepend=-1))
        low, high = self._low[self._target], self._high[self._target]
        self._lowest, self._width = low.astype(np.int8)[of_row], (high - low).astype(np.uint8)[of_row]

    def under(self, source: Int[np.ndarray, " rows"]) -> tuple[Float[np.ndarray, " n"], float]:
        """Return the statistics when row i has the concept of row source[i], and the share of rows that have one."""
        z = np.zeros(len(self.which))
        codes = self._codes[source]
        rows, positives = self._per_entity(codes)
        n = rows.sum()
        if n == 0 or not len(self._live):
            return z, float(n) / max(self._known, 1)
        found = codes[self._row]
        # below the range, and where it does not apply, the difference wraps around to a large number
        holds = (found - self._lowest).view(np.uint8) <= self._width
        hit, fired = (
            np.add.reduceat(mask, self._stretch, dtype=np.int64).astype(np.float64)
            for mask in (holds, found >= 0)
        )
        hits, times = np.add.reduceat(hit, self._first), np.add.reduceat(fired, self._first)
        f, y = times / n, positives.sum(axis=1) / n
        # U of an entity is hit - y fired where the feature fires, and f times this everywhere
        apart = y[:, None] * rows - positives
        own = hit - y[self._target][self._pair] * fired
        shared = f[self._pair] * apart[self._target[self._pair], self._member]
        squares = f**2 * _squares(apart)[self._target] + np.add.reduceat(
            own * (own + 2 * shared), self._first
        )
        terms = f**2 * (y**2 * np.dot(rows, rows) + _squares(positives))[self._target]
        terms += np.add.reduceat(hit**2 + (y[self._target][self._pair] * fired) ** 2, self._first)
        varies = squares > ROUNDING * terms
        z[self._live[varies]] = (hits - n * f * y[self._target])[varies] / np.sqrt(squares[varies])
        return z, float(n) / max(self._known, 1)

    def _per_entity(
        self, codes: Int[np.ndarray, " rows"]
    ) -> tuple[Float[np.ndarray, " n_entities"], Float[np.ndarray, "targets n_entities"]]:
        """Return each entity's rows on which the concept applies, and on which each target holds."""
        n_entities, cells = self._rows.n_entities, self._bins + 1
        found = np.bincount(self._rows.member * cells + codes + 1, minlength=n_entities * cells)
        up_to = found.reshape(n_entities, cells).T[1:].cumsum(axis=0)
        up_to = np.concatenate([np.zeros((1, n_entities), np.int64), up_to]).astype(np.float64)
        return up_to[-1], up_to[self._high + 1] - up_to[self._low]


def _fired(evidence: Evidence, pair: Pair) -> Int[np.ndarray, " n"]:
    """Return the rows on which a pair's feature is above its threshold, ascending."""
    detector = detector_of(evidence, pair)
    rows: np.ndarray = np.sort(detector.row[detector.value > detector.threshold])
    return rows


def _squares(x: Float[np.ndarray, "n n_entities"]) -> Float[np.ndarray, " n"]:
    squares: np.ndarray = np.einsum("ne,ne->n", x, x)
    return squares
