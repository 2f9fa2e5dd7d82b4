"""What features are compared with: concepts, and the nuisances and controls that must not explain them, as small codes.

Every concept becomes one int8 per row: -1 where it does not apply, 0 / 1 for a yes-or-no concept, the bin for a numeric
one. A target is a concept with a range of bins, so a yes-or-no concept's target is bin 1 and a numeric one's an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from activations_cache.splits import hash_uniform

from .evidence import Rows

Family = Literal["concept", "clock", "hash", "persistent", "permuted"]
CONTROLS: tuple[Family, ...] = ("hash", "persistent", "permuted")
_QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_MOVED = 0.01
"""Share of a bin's rows that may change sides so that its ends have fewer digits."""
_HASH_RATES = (0.5, 0.2, 0.05, 0.01)


class Target(NamedTuple):
    """A concept and a range of its bins, both ends included."""

    concept: str
    low: int
    high: int


@dataclass(frozen=True)
class Coded:
    """One concept as small codes on the rows of each split.

    Attributes
    ----------
    id
        The concept's id; controls and clocks carry a prefix with a colon, which no concept's id can hold.
    family
        What it is for.
    edges
        Bin b of a numeric concept holds edges[b] <= value < edges[b + 1]; None for a yes-or-no concept.
    codes
        Split -> int8 `[rows]`, -1 = does not apply.
    """

    id: str
    family: Family
    edges: Float[np.ndarray, " bounds"] | None
    codes: Mapping[str, Int[np.ndarray, " rows"]]

    @property
    def n_bins(self) -> int:
        """Number of bins; 2 for a yes-or-no concept."""
        return 2 if self.edges is None else len(self.edges) - 1

    def truth(
        self, split: str, target: Target
    ) -> tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Return where the target holds and where it applies."""
        codes = self.codes[split]
        return (codes >= target.low) & (codes <= target.high), codes >= 0

    def bounds(self, target: Target) -> tuple[float | None, float | None]:
        """Return the interval of values that a target means; None = open on that side or not numeric."""
        if self.edges is None:
            return None, None
        low = None if target.low == 0 else float(self.edges[target.low])
        high = None if target.high == self.n_bins - 1 else float(self.edges[target.high + 1])
        return low, high


def code_concept(
    id_: str,
    family: Family,
    values: Mapping[str, np.ndarray],
    known: Mapping[str, np.ndarray],
    *,
    numeric: bool,
) -> Coded:
    """Code a concept from its values per split; the bins of a numeric one come from `discover` alone."""
    if not numeric:
        codes = {s: np.where(known[s], v.astype(bool), -1).astype(np.int8) for s, v in values.items()}
        return Coded(id_, family, None, codes)
    edges = _edges(values["discover"][known["discover"]].astype(np.float64))
    codes = {}
    for split, v in values.items():
        # the outer bins are open: values beyond those of discover belong to them
        bins = np.searchsorted(edges[1:-1], np.where(known[split], v, 0.0), side="right")
        codes[split] = np.where(known[split], bins, -1).astype(np.int8)
    return Coded(id_, family, edges, codes)


def clocks(rows: Mapping[str, Rows]) -> list[Coded]:
    """Return position, calendar time, and the time at which an entity's history starts, as nuisances."""
    everywhere = {s: np.ones(len(r), dtype=bool) for s, r in rows.items()}
    values = {
        "position": {s: r.position for s, r in rows.items()},
        "time": {s: r.time for s, r in rows.items()},
        "start": {s: _start(r) for s, r in rows.items()},
    }
    return [code_concept(f"clock:{name}", "clock", v, everywhere, numeric=True) for name, v in values.items()]


def hash_controls(rows: Mapping[str, Rows], names: Sequence[str], *, seed: int) -> list[Coded]:
    """Return bits that are constant per entity and mean nothing, at several rates.

    Parameters
    ----------
    names
        The canonical text of every entity code.
    """
    out = []
    for i, rate in enumerate(_HASH_RATES * 2):
        u = hash_uniform(seed, "control", [f"{i}|{name}" for name in names])
        codes = {s: (u[r.entity] < rate).astype(np.int8) for s, r in rows.items()}
        out.append(Coded(f"hash:{i}", "hash", None, codes))
    return out


def persistent_controls(rows: Mapping[str, Rows], concepts: Sequence[Coded], *, seed: int) -> list[Coded]:
    """Return, per concept, a random chain along each entity with the concept's prevalence and persistence.

    A numeric concept lends those of its top tenth.
    """
    out = []
    for index, concept in enumerate(concepts):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1, index])))
        on, known = _binary(concept, "discover")
        prevalence, stay = _persistence(rows["discover"], on, known)
        codes = {s: _chain(r, prevalence, stay, rng).astype(np.int8) for s, r in rows.items()}
        out.append(Coded(f"persistent:{concept.id}", "persistent", None, codes))
    return out


def permuted_controls(rows: Mapping[str, Rows], concepts: Sequence[Coded], *, seed: int) -> list[Coded]:
    """Return every concept with whole trajectories given to other entities, aligned by calendar time."""
    sources = {
        s: permute_trajectories(
            r, np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 2, i])))
        )
        for i, (s, r) in enumerate(rows.items())
    }
    return [
        Coded(
            f"permuted:{c.id}",
            "permuted",
            c.edges,
            {s: np.where(sources[s] >= 0, c.codes[s][sources[s]], -1).astype(np.int8) for s in rows},
        )
        for c in concepts
    ]


def permute_trajectories(rows: Rows, rng: np.random.Generator) -> Int[np.ndarray, " rows"]:
    """Return, for every row, the row of another entity at the same time, or -1 where that entity has none.

    Each entity takes the whole trajectory of one other, so dependence along time and on the calendar survives and
    everything that is particular to the entity goes. Entities are drawn among all: within vintages, months on book
    would be the same after permutation as before.
    """
    donor = rng.permutation(rows.n_entities)
    n_periods = rows.period.max() + 1
    keys = rows.member * n_periods + rows.period
    wanted = donor[rows.member] * n_periods + rows.period
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


def _start(rows: Rows) -> Int[np.ndarray, " rows"]:
    """Return the time of position 0, from the first row that an entity has here: later ones may follow a gap."""
    first = np.flatnonzero(np.diff(rows.member, prepend=-1))
    return np.asarray((rows.time[first] - rows.position[first])[rows.member])


def _edges(values: np.ndarray) -> np.ndarray:
    """Return bin edges: every distinct value where they are few, else quantiles with both tails resolved."""
    distinct = np.unique(values)
    if len(distinct) <= 1:
        return np.array([-np.inf, np.inf])
    if len(distinct) <= len(_QUANTILES) + 1:
        inner = distinct[1:]
    else:
        inner = np.unique(np.quantile(values, _QUANTILES))
        inner = inner[inner > distinct[0]]
        spike = distinct[0] == np.quantile(values, _QUANTILES[0])
        if spike:
            # a spike at the smallest value gets a bin of its own
            inner = np.unique(np.concatenate([[distinct[1]], inner]))
        inner = _shortened(inner, values, keep_first=bool(spike))
    return np.concatenate([[-np.inf], inner, [np.inf]])


def _shortened(edges: np.ndarray, values: np.ndarray, *, keep_first: bool) -> np.ndarray:
    """Return edges in as few digits as move little of the bins beside them, or nothing: they are read in labels."""
    ordered = np.sort(values)
    places = np.searchsorted(ordered, edges)
    sizes = np.diff(places, prepend=0, append=len(ordered))
    room = _MOVED * np.minimum(sizes[:-1], sizes[1:])
    room[0] *= not keep_first
    short = []
    for edge, place, most in zip(edges, places, room, strict=True):
        # seventeen digits tell any double from all others
        written = (float(f"{edge:.{n}g}") for n in range(1, 18))
        short.append(next(w for w in written if abs(np.searchsorted(ordered, w) - place) <= most))
    # between bins without rows two could meet
    return np.array(short) if (np.diff(short) > 0).all() else edges


def _binary(concept: Coded, split: str) -> tuple[np.ndarray, np.ndarray]:
    codes = concept.codes[split]
    if concept.edges is None:
        return codes == 1, codes >= 0
    known = codes >= 0
    share = np.cumsum(np.bincount(codes[known], minlength=concept.n_bins)[::-1])[::-1] / max(known.sum(), 1)
    return codes >= int(np.argmin(np.abs(share - 0.1))), known


def _persistence(rows: Rows, on: np.ndarray, known: np.ndarray) -> tuple[float, float]:
    """Return the prevalence, and the correlation between adjacent known rows of an entity."""
    prevalence = float(on[known].mean()) if known.any() else 0.0
    pair = (np.diff(rows.member) == 0) & known[1:] & known[:-1]
    a, b = on[:-1][pair].astype(float), on[1:][pair].astype(float)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return prevalence, 0.0
    return prevalence, float(np.clip(np.corrcoef(a, b)[0, 1], 0.0, 0.99))


def _chain(rows: Rows, prevalence: float, stay: float, rng: np.random.Generator) -> np.ndarray:
    """Draw along each entity: keep the last value with probability `stay`, else draw anew at the prevalence."""
    fresh = rng.random(len(rows)) < prevalence
    renew = rng.random(len(rows)) >= stay
    renew |= np.diff(rows.member, prepend=-1) != 0
    return fresh[np.maximum.accumulate(np.where(renew, np.arange(len(rows)), 0))]
