"""What is shown of a feature: entities in bands of activation, near misses, false alarms, and its histogram."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from .evidence import Evidence, Rows

N_BINS = 30


def histogram(
    evidence: Evidence, feature: int, holds: Bool[np.ndarray, " rows"], applies: Bool[np.ndarray, " rows"]
) -> Iterator[dict[str, Any]]:
    """Yield the activation histogram split by the concept; the first bin, 0 to 0, holds the silent rows."""
    row, value = evidence.of(feature)
    state = np.where(applies, holds.astype(np.int64), 2)
    silent = np.bincount(state, minlength=3) - np.bincount(state[row], minlength=3)
    yield _bin(feature, 0.0, 0.0, silent)
    if not len(value):
        return
    edges = np.linspace(0, float(value[0]), N_BINS + 1)
    where = np.clip(np.searchsorted(edges, value, side="left") - 1, 0, N_BINS - 1)
    counts = np.bincount(where * 3 + state[row], minlength=3 * N_BINS).reshape(N_BINS, 3)
    for i in range(N_BINS):
        yield _bin(feature, float(edges[i]), float(edges[i + 1]), counts[i])


def _bin(feature: int, low: float, high: float, counts: np.ndarray) -> dict[str, Any]:
    return {
        "feature": feature,
        "low": low,
        "high": high,
        "n_true": int(counts[1]),
        "n_false": int(counts[0]),
        "n_unknown": int(counts[2]),
    }


def choose(
    evidence: Evidence,
    feature: int,
    threshold: float,
    holds: Bool[np.ndarray, " rows"],
    applies: Bool[np.ndarray, " rows"],
    *,
    per_band: int,
    rng: np.random.Generator,
) -> dict[str, list[int]]:
    """Return members (entities of the split) per band.

    `top` has the largest activations; `middle` and `low` are drawn from the middle and lowest third of the entities on
    which it fires; `near_miss` has the concept and no activation at all; `false_alarm` fires where it does not hold.
    """
    rows = evidence.rows
    row, value = evidence.of(feature)
    peak = np.zeros(rows.n_entities, dtype=np.float32)
    np.maximum.at(peak, rows.member[row], value)
    order = np.argsort(-peak, kind="stable")
    order = order[peak[order] > 0]
    third = len(order) // 3
    above = row[value > threshold]
    alarms = np.unique(rows.member[above[applies[above] & ~holds[above]]])
    missed = np.setdiff1d(np.unique(rows.member[holds & applies]), order)

    def draw(members: np.ndarray) -> list[int]:
        return [int(m) for m in np.sort(rng.permutation(members)[:per_band])]

    return {
        "top": order[:per_band].tolist(),
        "middle": draw(order[third : 2 * third]),
        "low": draw(order[2 * third :]),
        "near_miss": draw(missed),
        "false_alarm": draw(alarms),
    }


def timelines(
    evidence: Evidence,
    feature: int,
    bands: Mapping[str, Sequence[int]],
    holds: Bool[np.ndarray, " rows"],
    applies: Bool[np.ndarray, " rows"],
    ids: Sequence[str],
    raw: tuple[Sequence[str], Float[np.ndarray, "rows columns"]] | None,
) -> Iterator[dict[str, Any]]:
    """Yield one record per row of every example's history."""
    rows = evidence.rows
    activation = np.zeros(len(rows), dtype=np.float32)
    row, value = evidence.of(feature)
    activation[row] = value
    bounds = _bounds(rows)
    for band, members in bands.items():
        for number, member in enumerate(members):
            for r in range(bounds[member], bounds[member + 1]):
                record: dict[str, Any] = {
                    "feature": feature,
                    "band": band,
                    "example": number,
                    "entity": ids[rows.codes[member]],
                    "position": int(rows.position[r]),
                    "time": int(rows.time[r]),
                    "activation": float(activation[r]),
                    "concept_true": bool(holds[r]) if applies[r] else None,
                }
                if raw is not None:
                    record |= {
                        f"raw_{name}": float(v) if np.isfinite(v) else None
                        for name, v in zip(raw[0], raw[1][r], strict=True)
                    }
                yield record


def _bounds(rows: Rows) -> Int[np.ndarray, " bounds"]:
    return np.searchsorted(rows.member, np.arange(rows.n_entities + 1))
