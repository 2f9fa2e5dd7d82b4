"""Write one block: the order of its rows, its shard files, its index and its moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Int64, Shaped
from safetensors.numpy import save

from .commits import Commit, SplitBlock
from .copying import Copying, FileThreads, Turns
from .durable import crc32c
from .index import index_block
from .moments import Moments, merge_moments
from .places import Place
from .schema import COLUMNS, ArraySpec, Description
from .shards import write_shard
from .summing import RowSums


def run_starts(
    entity: Int64[np.ndarray, " rows"], position: Int64[np.ndarray, " rows"], run_length: int
) -> Int64[np.ndarray, " runs"]:
    """Return where runs begin: at most `run_length` rows of one entity at consecutive positions."""
    if len(entity) == 0:
        return np.zeros(0, np.int64)
    if run_length == 1:
        return np.arange(len(entity))
    new = np.ones(len(entity), bool)
    new[1:] = (entity[1:] != entity[:-1]) | (position[1:] != position[:-1] + 1)
    chain = np.maximum.accumulate(np.where(new, np.arange(len(entity)), 0))
    new |= (np.arange(len(entity)) - chain) % run_length == 0
    starts: np.ndarray = np.flatnonzero(new)
    return starts


def shuffled_runs(
    rng: np.random.Generator, starts: Int64[np.ndarray, " runs"], rows: int
) -> Int64[np.ndarray, " rows"]:
    """Return a random order of `rows` rows in which runs move as wholes."""
    if len(starts) == rows:
        return rng.permutation(rows)
    chosen = rng.permutation(len(starts))
    lengths = np.diff(starts, append=rows)[chosen]
    ends = np.cumsum(lengths)
    order: np.ndarray = np.arange(rows) + np.repeat(starts[chosen] - (ends - lengths), lengths)
    return order


def block_orders(
    columns: Mapping[str, np.ndarray],
    codes: Int64[np.ndarray, " rows"],
    names: Sequence[str],
    *,
    rng: np.random.Generator | None,
    run_length: int,
) -> dict[str, Int64[np.ndarray, " n"]]:
    """Return, for each split that a block has rows of, which rows it stores and in which order.

    Parameters
    ----------
    columns
        The block's columns by name.
    codes, names
        The split of each row, as a number that counts through the names.
    rng
        The block's own generator; None leaves the rows as they are.
    run_length
        Rows of an entity that stay together.
    """
    order = np.arange(len(codes))
    if rng is not None:
        order = shuffled_runs(rng, run_starts(columns["entity"], columns["position"], run_length), len(codes))
    shuffled = codes[order]
    return {names[code]: order[shuffled == code] for code in np.unique(codes).tolist()}


@dataclass(frozen=True)
class BlockRows:
    """The rows of a block in memory.

    Attributes
    ----------
    columns
        Entity, position and time, in the order in which rows came.
    acts
        Memory that holds the rows of each hook, in the format on disk.
    slots
        Where in that memory each row is.
    copied
        Called with slots once their rows are copied.
    """

    columns: Mapping[str, Int64[np.ndarray, " rows"]]
    acts: Mapping[str, Shaped[np.ndarray, "slots _d_in"]]
    slots: Int64[np.ndarray, " rows"]
    copied: Callable[[Int64[np.ndarray, " n"]], None] = lambda _: None


@dataclass(frozen=True)
class _Shard:
    """One file: rows `order` of the memory of one array."""

    path: Place
    split: str
    array: str
    spec: ArraySpec
    source: Shaped[np.ndarray, "slots ..."]
    order: Int64[np.ndarray, " n"]


class PendingBlock:
    """A block whose files are being written by other threads.

    Parameters
    ----------
    folder
        The writer's folder.
    description
        The store.
    rows
        What is written.
    orders
        Per split, the rows to store in storage order.
    commit
        Number, cursor and revision of the block, and in `splits` the shard at which each split starts.
    threads
        Who writes.
    """

    def __init__(
        self,
        folder: Place,
        description: Description,
        rows: BlockRows,
        orders: Mapping[str, Int64[np.ndarray, " n"]],
        *,
        commit: Commit,
        threads: FileThreads,
    ) -> None:
        self._folder, self._description, self._rows = folder, description, rows
        self._orders, self._commit, self._threads = orders, commit, threads
        self._folders = (folder / "blocks").make()
        self._written: list[tuple[_Shard, Future[tuple[int, list[Moments]]]]] = []
        # small files first: they are synced while the large ones are copied
        for shard in self._shards(list(COLUMNS), rows.columns, orders):
            self._begin(shard, Turns(threads, 1, lambda: None))
        slots = {split: rows.slots[order] for split, order in orders.items()}
        hooks = list(description.hooks)
        by_file: dict[tuple[str, str], list[_Shard]] = {}
        for shard in self._shards(hooks, rows.acts, slots):
            by_file.setdefault((shard.split, shard.path.name), []).append(shard)
        for same_rows in by_file.values():
            copied = partial(rows.copied, same_rows[0].order)
            turns = Turns(threads, len(same_rows), copied)
            for shard in same_rows:
                self._begin(shard, turns)

    def finish(self) -> Commit:
        """Wait until all files are durable and return the block's commit record, which the caller writes.

        Raises
        ------
        StoreError
            The disk is full.
        """
        description, threads = self._description, self._threads
        try:
            results = [(shard, future.result()) for shard, future in self._written]
        finally:
            for _, future in self._written:
                future.cancel()
        list(threads.pool.map(Place.sync, self._folders))
        extra: dict[str, np.ndarray] = {}
        parts: dict[str, SplitBlock] = {}
        columns = self._rows.columns
        for split, order in self._orders.items():
            extra |= index_block(split, columns["entity"][order], columns["position"][order])
            mine = [(shard.array, *result) for shard, result in results if shard.split == split]
            crcs = {name: [crc for array, crc, _ in mine if array == name] for name in description.arrays()}
            for hook, width in description.hooks.items():
                found = [part for array, _, moments in mine if array == hook for part in moments]
                extra |= merge_moments(found, width).tensors(f"{split}/moments/{hook}")
            parts[split] = SplitBlock(self._commit.splits[split].shard, len(order), crcs)
        data = bytes(save(extra))
        (self._folder / "blocks" / self._commit.extra_name).create(data)
        return replace(self._commit, splits=parts, extra_bytes=len(data), extra_crc=crc32c(data))

    def _shards(
        self,
        names: Sequence[str],
        sources: Mapping[str, np.ndarray],
        orders: Mapping[str, Int64[np.ndarray, " n"]],
    ) -> Iterator[_Shard]:
        specs, size = self._description.arrays(), self._description.geometry.shard_rows
        for split, order in orders.items():
            for i, start in enumerate(range(0, len(order), size)):
                number, part = self._commit.splits[split].shard + i, order[start : start + size]
                for name in names:
                    path = self._folder / split / specs[name].path / specs[name].shard_name(number)
                    yield _Shard(path, split, name, specs[name], sources[name], part)

    def _begin(self, shard: _Shard, turns: Turns) -> None:
        self._folders |= shard.path.parent.make()
        self._written.append((shard, self._threads.pool.submit(_write, shard, self._description, turns)))


def write_block(
    folder: Place,
    description: Description,
    rows: Mapping[str, Shaped[np.ndarray, "rows ..."]],
    orders: Mapping[str, Int64[np.ndarray, " n"]],
    *,
    commit: Commit,
) -> Commit:
    """Write all files of a block, durably, and return its commit record, which the caller writes.

    Parameters
    ----------
    folder
        The writer's folder.
    description
        The store.
    rows
        Columns and hooks by name, in the format on disk.
    orders
        Per split, the rows to store in storage order.
    commit
        Number, cursor and revision of the block, and in `splits` the shard at which each split starts.

    Raises
    ------
    StoreError
        The disk is full.
    """
    acts = {hook: rows[hook] for hook in description.hooks}
    block = BlockRows({name: rows[name] for name in COLUMNS}, acts, np.arange(len(rows["entity"])))
    with FileThreads() as threads:
        return PendingBlock(folder, description, block, orders, commit=commit, threads=threads).finish()


def _write(shard: _Shard, description: Description, turns: Turns) -> tuple[int, list[Moments]]:
    found: list[Moments] = []
    rows = description.geometry.chunk_rows

    def again(dimensions: np.ndarray) -> Iterator[np.ndarray]:
        few = len(dimensions) * 8 < shard.source.shape[1]
        for start in range(0, len(shard.order), rows):
            part = shard.order[start : start + rows]
            if few:
                yield shard.source[part[:, None], dimensions]
            else:
                yield np.take(np.take(shard.source, part, axis=0), dimensions, axis=1)

    @contextmanager
    def copying() -> Iterator[Copying]:
        with turns.turn() as scratch:
            if shard.array in COLUMNS:
                yield Copying(scratch)
                return
            width = description.hooks[shard.array]
            sums = RowSums(
                shard.spec.logical_dtype, width, covariance=description.covariance, scratch=scratch
            )
            yield Copying(scratch, sums.add)
            # before the turn ends: then the rows' memory is used again
            found.append(sums.moments(again))

    crc = write_shard(
        shard.path,
        shard.source,
        shard.order,
        spec=shard.spec,
        geometry=description.geometry,
        copying=copying(),
    )
    return crc, found
