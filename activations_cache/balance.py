"""Entities in equal measure: of a long history an epoch serves only some rows, others in the next.

Of an entity with n rows an epoch serves m_n = min(m, n), spread evenly over its history: row j is served if
floor((j + s) m_n / n) < floor((j + 1 + s) m_n / n), which holds for exactly m_n of the n rows whatever s is.
The shift s is drawn anew for each entity and epoch, so every row has the same chance m_n / n.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int64

from .index import read_block
from .store import ActivationStore


class EntityBalance:
    """Which rows of a split each epoch serves.

    Parameters
    ----------
    store, split
        The rows.
    blocks
        How many blocks of each writer count.
    entity_rows
        Rows that an epoch serves of an entity at most.
    seed
        Of the shifts.

    Attributes
    ----------
    rows
        Rows of an epoch.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: str,
        blocks: dict[int, int],
        *,
        entity_rows: int,
        seed: int,
    ) -> None:
        self._store, self._split, self._seed = store, split, seed
        self._parts = [
            (group.folder, commit)
            for group in store.groups
            for commit in group.commits[: blocks.get(group.number, 0)]
            if split in commit.splits
        ]
        self._table = store.chunks(split, blocks)
        self._ends = np.cumsum(self._table.rows)
        found = [self._index(i)[:2] for i in range(len(self._parts))]
        self._entities, which = np.unique(np.concatenate([e for e, _ in found]), return_inverse=True)
        self._counts = np.bincount(which, np.concatenate([n for _, n in found])).astype(np.int64)
        self._served = np.minimum(entity_rows, self._counts)
        self.rows = int(self._served.sum())
        self._mask = lru_cache(maxsize=2)(self._make_mask)

    def chunk_rows(self, epoch: int) -> Int64[np.ndarray, " chunks"]:
        """Return how many rows each chunk serves in an epoch, in storage order."""
        served = np.append(0, np.cumsum(self._mask(epoch)))[np.append(0, self._ends)]
        rows: np.ndarray = np.diff(served)
        return rows

    def served(self, epoch: int, chunk: int) -> Int64[np.ndarray, " rows"]:
        """Return which rows of a chunk are served in an epoch, ascending."""
        end = int(self._ends[chunk])
        rows: np.ndarray = np.flatnonzero(self._mask(epoch)[end - int(self._table.rows[chunk]) : end])
        return rows

    def all_served(self, epoch: int) -> Int64[np.ndarray, " rows"]:
        """Return which rows of the split are served in an epoch, counted through in storage order."""
        rows: np.ndarray = np.flatnonzero(self._mask(epoch))
        return rows

    def _make_mask(self, epoch: int) -> Bool[np.ndarray, " rows"]:
        """Return for every row of the split, in storage order, whether an epoch serves it."""
        # another stream than the order of the chunks
        seed = np.random.SeedSequence([self._seed, epoch], spawn_key=(1,))
        shifts = np.random.Generator(np.random.Philox(seed)).integers(0, self._counts)
        seen = np.zeros(len(self._entities), np.int64)
        mask = np.zeros(int(self._ends[-1]), bool)
        at = 0
        for i in range(len(self._parts)):
            entity, counts, order = self._index(i)
            which = np.searchsorted(self._entities, entity)
            before = np.cumsum(counts) - counts
            j = np.arange(len(order)) - np.repeat(before - seen[which] - shifts[which], counts)
            m, n = np.repeat(self._served[which], counts), np.repeat(self._counts[which], counts)
            mask[at + order] = j * m // n < (j + 1) * m // n
            seen[which] += counts
            at += len(order)
        return mask

    def _index(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a block's entities, how many rows each has, and its rows in order of (entity, position)."""
        folder, commit = self._parts[i]
        tensors = read_block(folder, commit)
        entity, offsets, order = (tensors[f"{self._split}/{name}"] for name in ("entity", "offsets", "order"))
        return entity, np.diff(offsets), order.astype(np.int64)
