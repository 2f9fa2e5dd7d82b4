"""The codes of one split, by feature: all that the statistics of a dictionary need, gathered once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, Int8

from activations_cache.store import ActivationStore
from sae.dictionary import Dictionary

N_LEVELS = 64
"""Thresholds tried per feature: 0, and values that it takes."""


@dataclass(frozen=True)
class Rows:
    """Who and when: the rows of one split, sorted by entity, then time.

    Attributes
    ----------
    entity, time, position
        int64 `[rows]`.
    member
        int64 `[rows]`: the entity's index within this split, 0 .. n_entities - 1.
    codes
        int64 `[n_entities]`: the entity code of each member.
    """

    split: str
    entity: Int[np.ndarray, " rows"]
    time: Int[np.ndarray, " rows"]
    position: Int[np.ndarray, " rows"]
    member: Int[np.ndarray, " rows"]
    codes: Int[np.ndarray, " n_entities"]

    def __len__(self) -> int:
        return len(self.entity)

    @property
    def n_entities(self) -> int:
        """Entities with a row in this split."""
        return len(self.codes)

    @cached_property
    def period(self) -> Int[np.ndarray, " rows"]:
        """Each row's time as a number, 0, 1, .. for the split's times in order; times themselves may be nanoseconds."""
        return np.unique(self.time, return_inverse=True)[1]


@dataclass(frozen=True)
class Evidence:
    """Positive activations of every feature on one split's rows.

    Attributes
    ----------
    rows
        Who and when.
    starts
        int64 `[d_sae + 1]`: feature j holds entries starts[j]:starts[j + 1].
    row, value
        `[nnz]`: row index and activation, each feature's largest first (ties by row).
    """

    rows: Rows
    starts: Int[np.ndarray, " bounds"]
    row: Int[np.ndarray, " nnz"]
    value: Float[np.ndarray, " nnz"]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.starts) - 1

    @property
    def count(self) -> Int[np.ndarray, " d_sae"]:
        """Rows on which each feature fires."""
        return np.diff(self.starts)

    def of(self, feature: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return the rows and values of one feature, largest first."""
        part = slice(self.starts[feature], self.starts[feature + 1])
        return self.row[part], self.value[part]

    def thresholds(self) -> Float[np.ndarray, "d_sae levels"]:
        """Return each feature's candidate thresholds, rising: 0, then values of it, closest together at its largest."""
        out = np.zeros((self.d_sae, N_LEVELS), dtype=np.float32)
        live = np.flatnonzero(self.count)
        # no interpolation: thresholds are seen values
        out[live, 1:] = self.value[self.starts[live, None] + _ranks(self.count[live])[:, ::-1]]
        return out

    def levels(self, thresholds: Float[np.ndarray, "d_sae levels"]) -> Int8[np.ndarray, " nnz"]:
        """Return, per entry, the highest level whose threshold the value exceeds strictly."""
        out = np.empty(len(self.value), dtype=np.int8)
        for j in np.flatnonzero(self.count):
            part = slice(self.starts[j], self.starts[j + 1])
            out[part] = np.searchsorted(thresholds[j], self.value[part], side="left") - 1
        return out


def _ranks(n: Int[np.ndarray, " features"]) -> Int[np.ndarray, "features thresholds"]:
    """Return how many of n values lie above each threshold where none tie, rising: 1 to n - 1, each, if n is 64 at most.

    Half of them rise geometrically from 1 to a tenth of n, by at least 1, so that a concept much rarer than its feature
    finds thresholds too; the others are evenly spaced from there to n, at about the step with which the first half ends.
    """
    half = N_LEVELS // 2
    few = np.maximum(np.geomspace(1, n / 10, half - 1, axis=1), np.arange(1, half))
    many = np.linspace(few[:, -1], n, half + 2, axis=1)[:, 1:-1]
    return np.asarray(np.minimum(np.concatenate([few, many], axis=1).astype(np.int64), n[:, None] - 1))


def rows_of(
    split: str, entity: np.ndarray, time: np.ndarray, position: np.ndarray
) -> tuple[Rows, np.ndarray]:
    """Return the rows sorted by entity and time, and where each given row went."""
    order = np.lexsort((time, entity))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    codes, member = np.unique(entity[order], return_inverse=True)
    return Rows(split, entity[order], time[order], position[order], member, codes), place


def gather(
    store: ActivationStore,
    sae: Dictionary,
    hook: str,
    split: str,
    *,
    report: Callable[[int], None] = lambda _: None,
) -> Evidence:
    """Encode every row of a split and return its codes by feature.

    Parameters
    ----------
    report
        Called with the number of rows done.
    """
    entity, time, position, counts, features, values = [], [], [], [], [], []
    done = 0
    with torch.inference_mode():
        for part in store.rows(hook, split):
            codes = sae.encode(torch.from_numpy(part.acts))
            entity.append(part.entity)
            time.append(part.time)
            position.append(part.position)
            counts.append(codes.offsets.diff().cpu().numpy())
            features.append(codes.features.to(torch.int32).cpu().numpy())
            values.append(codes.values.float().cpu().numpy())
            done += len(part.entity)
            report(done)
    rows, place = rows_of(split, np.concatenate(entity), np.concatenate(time), np.concatenate(position))
    row = np.repeat(place, np.concatenate(counts))
    return by_feature(rows, sae.d_sae, row, np.concatenate(features), np.concatenate(values))


def by_feature(rows: Rows, d_sae: int, row: np.ndarray, feature: np.ndarray, value: np.ndarray) -> Evidence:
    """Group (row, feature, value) entries by feature, largest value first; values that are not positive are left out."""
    keep = value > 0
    row, feature, value = row[keep], feature[keep], value[keep]
    order = np.lexsort((row, -value, feature))
    starts = np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=d_sae))])
    return Evidence(rows, starts, row[order].astype(np.int64), value[order].astype(np.float32))
