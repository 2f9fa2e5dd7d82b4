"""Where the rows of an entity are: an order of each block, and which blocks hold which entity."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt32
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sae.errors import StoreError

from .commits import Commit, Group, SplitBlock
from .durable import crc32c
from .places import Place
from .schema import Geometry

_FIELDS = ("entity", "writer", "split", "block", "start", "count")


def index_block(
    split: str, entity: Int64[np.ndarray, " rows"], position: Int64[np.ndarray, " rows"]
) -> dict[str, np.ndarray]:
    """Return the index of one split's rows of one block, as named arrays.

    `order` lists the rows by (entity, position); entity i of `entity` has `order[offsets[i]:offsets[i + 1]]`.
    """
    order = np.lexsort((position, entity))
    entities, starts = np.unique(entity[order], return_index=True)
    offsets = np.append(starts, len(entity)).astype(np.int64)
    named = {"entity": entities, "offsets": offsets, "order": order.astype(np.uint32)}
    return {f"{split}/{name}": np.ascontiguousarray(value) for name, value in named.items()}


def read_tensors(path: Place, size: int, crc: int) -> dict[str, Any]:
    """Read a safetensors file of known size and checksum.

    Raises
    ------
    StoreError
        It is missing or not that file.
    """
    data = path.read()
    if len(data) != size or crc32c(data) != crc:
        raise StoreError(
            f"{path} is damaged", got=f"{len(data)} bytes", expected=f"{size} bytes with the checksum {crc}"
        )
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged: it is not a safetensors file") from error


def read_block(writer: Place, commit: Commit) -> dict[str, Any]:
    """Read a block's index and moments from its writer's folder; StoreError if missing or damaged."""
    return read_tensors(writer / "blocks" / commit.extra_name, commit.extra_bytes, commit.extra_crc)


@dataclass(frozen=True)
class Directory:
    """Which blocks hold which entity: one line per (entity, split, block), sorted by entity.

    Attributes
    ----------
    splits
        Names that `split` counts through.
    entity, writer, split, block
        The entity and where some of its rows are.
    start, count
        Which part of the block's `order` they are.
    """

    splits: tuple[str, ...]
    entity: Int64[np.ndarray, " lines"]
    writer: Int64[np.ndarray, " lines"]
    split: Int64[np.ndarray, " lines"]
    block: Int64[np.ndarray, " lines"]
    start: Int64[np.ndarray, " lines"]
    count: Int64[np.ndarray, " lines"]

    @classmethod
    def build(
        cls, splits: tuple[str, ...], blocks: Iterator[tuple[int, Commit, Mapping[str, Any]]]
    ) -> Directory:
        """Merge the indices of blocks, given as (writer, commit, named arrays)."""
        columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name in _FIELDS}
        for writer, commit, tensors in blocks:
            for name in commit.splits:
                entity, offsets = tensors[f"{name}/entity"], tensors[f"{name}/offsets"]
                constant = {"writer": writer, "split": splits.index(name), "block": commit.block}
                columns["entity"].append(entity)
                columns["start"].append(offsets[:-1])
                columns["count"].append(np.diff(offsets))
                for key, value in constant.items():
                    columns[key].append(np.full(len(entity), value, np.int64))
        merged = {name: np.concatenate(parts) for name, parts in columns.items()}
        order = np.lexsort((merged["block"], merged["writer"], merged["split"], merged["entity"]))
        return cls(splits=splits, **{name: value[order] for name, value in merged.items()})

    def lines(self, entities: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " lines"]:
        """Return the numbers of the lines of some entities, given ascending.

        Raises
        ------
        StoreError
            Some are not in the store.
        """
        first = np.searchsorted(self.entity, entities, side="left")
        last = np.searchsorted(self.entity, entities, side="right")
        absent = entities[first == last]
        if len(absent):
            shown = ", ".join(map(str, absent[:5].tolist())) + (", ..." if len(absent) > 5 else "")
            raise StoreError(
                f"{len(absent)} entities are not in the store", got=shown, expected="codes that it holds"
            )
        counts = last - first
        return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())

    def to_bytes(self) -> bytes:
        """Return the directory as a safetensors file."""
        # one entry: the order of several is another at every call, and who seals twice must write the same
        names = {"splits": json.dumps(self.splits)}
        return bytes(save({name: getattr(self, name) for name in _FIELDS}, metadata=names))

    @classmethod
    def read(cls, path: Place, splits: tuple[str, ...], size: int, crc: int) -> Directory:
        """Read what `to_bytes` returned; StoreError if the file is missing or damaged."""
        return cls(splits=splits, **read_tensors(path, size, crc))


class RowFinder:
    """Finds the rows of entities in the arrays of a store.

    Parameters
    ----------
    directory
        Which blocks hold which entity.
    groups
        The writers and their blocks.
    geometry
        Rows per shard.
    """

    def __init__(self, directory: Directory, groups: Sequence[Group], geometry: Geometry) -> None:
        self._directory, self._geometry = directory, geometry
        self._groups = {group.number: group for group in groups}
        self._block = lru_cache(maxsize=64)(self._read_block)

    def codes(self, split: str | None = None) -> Int64[np.ndarray, " entities"]:
        """Return the codes of all entities, or of those with rows in one split, ascending."""
        directory = self._directory
        if split is None:
            return np.unique(directory.entity)
        return np.unique(directory.entity[directory.split == directory.splits.index(split)])

    def blocks(self, codes: Int64[np.ndarray, " n"]) -> list[tuple[int, int]]:
        """Return writer and number of every block with rows of some entities; unknown ones have none."""
        lines = np.isin(self._directory.entity, codes)
        pairs = np.stack([self._directory.writer[lines], self._directory.block[lines]], axis=1)
        return [(writer, block) for writer, block in np.unique(pairs, axis=0).tolist()]

    def rows(self, codes: Int64[np.ndarray, " n"]) -> list[tuple[int, str, Int64[np.ndarray, " rows"]]]:
        """Return, per block that holds some of the entities, writer, split and ascending row numbers.

        Raises
        ------
        StoreError
            An entity is not in the store, or a block's index is damaged.
        """
        directory = self._directory
        lines = directory.lines(codes)
        keys = np.stack([directory.writer[lines], directory.split[lines], directory.block[lines]], axis=1)
        blocks, of_line = np.unique(keys, axis=0, return_inverse=True)
        places = []
        for i, (writer, split, block) in enumerate(blocks.tolist()):
            name = directory.splits[split]
            tensors, part = self._block(writer, block)
            mine = lines[of_line.reshape(-1) == i]
            pairs = zip(directory.start[mine].tolist(), directory.count[mine].tolist(), strict=True)
            rows = np.concatenate([rows_in_block(tensors, name, start, count) for start, count in pairs])
            first = part[name].shard * self._geometry.shard_rows
            places.append((writer, name, first + np.sort(rows.astype(np.int64))))
        return places

    def _read_block(self, writer: int, block: int) -> tuple[dict[str, Any], dict[str, SplitBlock]]:
        group = self._groups[writer]
        return read_block(group.folder, group.commits[block]), group.commits[block].splits


def rows_in_block(
    tensors: Mapping[str, Any], split: str, start: int, count: int
) -> UInt32[np.ndarray, " count"]:
    """Return, in order of position, where in its block a line's rows are stored."""
    order: np.ndarray = tensors[f"{split}/order"]
    return order[start : start + count]
