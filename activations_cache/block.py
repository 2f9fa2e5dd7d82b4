"""Write one block: the order of its rows, its shard files, its index and its moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped
from safetensors.numpy import save

from .commits import Commit, SplitBlock
from .durable import crc32c, run_all, sync_folder, write_file
from .formats import to_float32
from .index import index_block
from .moments import Moments, merge_moments
from .schema import COLUMNS, ArraySpec, Description
from .shards import write_shard


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
    rows: Mapping[str, np.ndarray],
    codes: Int64[np.ndarray, " rows"],
    names: Sequence[str],
    *,
    rng: np.random.Generator | None,
    run_length: int,
) -> dict[str, Int64[np.ndarray, " n"]]:
    """Return, for each split that a block has rows of, which rows it stores and in which order.

    Parameters
    ----------
    rows
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
        order = shuffled_runs(rng, run_starts(rows["entity"], rows["position"], run_length), len(codes))
    shuffled = codes[order]
    return {names[code]: order[shuffled == code] for code in np.unique(codes).tolist()}


@dataclass(frozen=True)
class _Shard:
    """One file to be written: rows `order` of one array."""

    folder: Path
    array: str
    spec: ArraySpec
    number: int
    order: Int64[np.ndarray, " n"]


def write_block(
    folder: Path,
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
    geometry = description.geometry
    shards: dict[str, list[_Shard]] = {}
    for split, order in orders.items():
        for name, spec in description.arrays().items():
            place = folder / split / spec.path
            place.mkdir(parents=True, exist_ok=True)
            for i, start in enumerate(range(0, len(order), geometry.shard_rows)):
                part = order[start : start + geometry.shard_rows]
                shards.setdefault(split, []).append(
                    _Shard(place, name, spec, commit.splits[split].shard + i, part)
                )
    every = [shard for split in shards.values() for shard in split]
    written = dict(
        zip(map(id, every), run_all([partial(_write, s, description, rows) for s in every]), strict=True)
    )
    for place in {shard.folder for shard in every}:
        sync_folder(place)
    extra: dict[str, np.ndarray] = {}
    parts: dict[str, SplitBlock] = {}
    for split, order in orders.items():
        extra |= index_block(split, rows["entity"][order], rows["position"][order])
        crcs: dict[str, list[int]] = {}
        moments: dict[str, list[Moments]] = {}
        for shard in shards[split]:
            crc, found = written[id(shard)]
            crcs.setdefault(shard.array, []).append(crc)
            moments.setdefault(shard.array, []).extend(found)
        for hook, width in description.hooks.items():
            extra |= merge_moments(moments[hook], width).tensors(f"{split}/moments/{hook}")
        parts[split] = SplitBlock(commit.splits[split].shard, len(order), crcs)
    data = bytes(save(extra))
    (folder / "blocks").mkdir(exist_ok=True)
    write_file(folder / "blocks" / commit.extra_name, data)
    return Commit(commit.block, commit.cursor, parts, len(data), crc32c(data), commit.revision)


def _write(
    shard: _Shard, description: Description, rows: Mapping[str, np.ndarray]
) -> tuple[int, list[Moments]]:
    moments: list[Moments] = []

    exact = np.empty((description.geometry.chunk_rows, *shard.spec.row_shape), np.float32)
    given = shard.spec.logical_dtype

    def visit(chunk: np.ndarray) -> None:
        if shard.array not in COLUMNS:
            wide = None if given == "float32" else exact[: len(chunk)]
            rows32 = to_float32(chunk, given, wide)
            moments.append(Moments.of(rows32, covariance=description.covariance))

    path = shard.folder / shard.spec.shard_name(shard.number)
    geometry, source = description.geometry, rows[shard.array]
    crc = write_shard(path, source, shard.order, spec=shard.spec, geometry=geometry, visit=visit)
    return crc, moments
