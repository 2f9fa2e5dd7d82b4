"""A store of activations, opened for reading: splits in storage order, histories in order of position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from sae.errors import StoreError

from .commits import Group, read_groups, split_rows
from .durable import file_crc, read_record, record_crc
from .formats import to_float32
from .index import Directory, read_block, read_tensors, rows_in_block
from .moments import Moments
from .schema import COLUMNS, Description
from .seal import merge_blocks
from .shards import ArrayReader
from .verify import (
    beside_store,
    checksum_problems,
    manifest_problems,
    metadata_problems,
    raise_problems,
    size_problems,
)

_THREADS = 2


class StoredRows(NamedTuple):
    """Rows of one hook, with whom and when they are about."""

    acts: Float32[np.ndarray, "rows d_in"]
    entity: Int64[np.ndarray, " rows"]
    position: Int64[np.ndarray, " rows"]
    time: Int64[np.ndarray, " rows"]


class StoredHooks(NamedTuple):
    """Rows of several hooks, with whom and when they are about."""

    acts: dict[str, Float32[np.ndarray, "rows _d_in"]]
    entity: Int64[np.ndarray, " rows"]
    position: Int64[np.ndarray, " rows"]
    time: Int64[np.ndarray, " rows"]


class ChunkTable(NamedTuple):
    """The chunks of a split in storage order: writer, number in the array, rows."""

    writer: Int64[np.ndarray, " chunks"]
    chunk: Int64[np.ndarray, " chunks"]
    rows: Int64[np.ndarray, " chunks"]


class ActivationStore:
    """Activations on disk.

    Attributes
    ----------
    path
        The store.
    description
        What its root says: dtype, geometry, seed and the rest.
    hooks
        Width of each hook.
    splits
        Rows of each split.
    n_rows
        Rows of all splits.
    provenance
        What the harvest noted about model, data and code.
    complete
        Whether it was sealed.
    """

    def __init__(
        self, path: Path, description: Description, groups: list[Group], files: Mapping[str, list[int]]
    ) -> None:
        self.path, self.description, self.groups = path, description, groups
        self.hooks = description.hooks
        self.splits = split_rows(groups)
        self.n_rows = sum(self.splits.values())
        self.provenance = description.provenance
        self.complete = description.sealed
        self._files = dict(files)
        self._readers: dict[tuple[int, str, str], ArrayReader] = {}
        self._specs = description.arrays()
        self._block = lru_cache(maxsize=64)(self._read_block)
        self._merged = lru_cache(maxsize=1)(self._read_merged)

    @classmethod
    def open(cls, path: Path, *, allow_incomplete: bool = False) -> ActivationStore:
        """Open a store after checking its manifest, every record, and the size of every file.

        Parameters
        ----------
        path
            The store.
        allow_incomplete
            Whether a harvest that has not ended may be read, as far as it is committed.

        Raises
        ------
        StoreError
            There is no store, it is incomplete, or it is damaged; each damaged file is named.
        """
        description = Description.read(path)
        if not description.sealed and not allow_incomplete:
            raise StoreError(
                f"{path} is incomplete: its harvest has not ended", do="run the harvest again; it continues"
            )
        groups = read_groups(path)
        problems = [p for g in groups for p in size_problems(g.folder, description, g.commits)]
        files: dict[str, list[int]] = {}
        if description.sealed:
            manifest = read_record(path / "manifest.json")
            files = manifest["files"]
            problems += [p for g in groups for p in metadata_problems(g.folder, description, g.commits)]
            problems += manifest_problems(path, manifest, groups)
        raise_problems(path, problems)
        return cls(path, description, groups, files)

    def digest(self) -> int:
        """Return a checksum of what is committed: another value once rows were added or erased."""
        return record_crc({group.folder.name: group.digest() for group in self.groups})

    def moments(self, hook: str, split: str) -> Moments:
        """Return count, mean, variance, extremes and norms of a hook's rows in one split.

        Raises
        ------
        StoreError
            There is no such hook or split, or the file with the moments is damaged.
        """
        self._check(hook, split)
        return Moments.from_tensors(self._merged()[1], f"{split}/{hook}")

    def rows(self, hook: str, split: str, *, batch_rows: int = 65536) -> Iterator[StoredRows]:
        """Yield every row of a split once, in storage order, `batch_rows` at a time (the last is short).

        Raises
        ------
        StoreError
            There is no such hook or split, or a chunk is damaged.
        """
        for batch in self.rows_of([hook], split, batch_rows=batch_rows):
            yield StoredRows(batch.acts[hook], *batch[1:])

    def rows_of(self, hooks: Sequence[str], split: str, *, batch_rows: int = 65536) -> Iterator[StoredHooks]:
        """Yield every row of a split once with several hooks; the next batch is read meanwhile."""
        for hook in hooks:
            self._check(hook, split)
        names = [*COLUMNS, *hooks]
        table = self.chunks(split)
        ends = np.cumsum(table.rows)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="assay-read") as pool:

            def start(first: int) -> Iterator[dict[str, np.ndarray]]:
                last = min(first + batch_rows, int(ends[-1]))
                return pool.map(
                    lambda name: {name: self._read_range(name, split, table, ends, first, last)}, names
                )

            ahead = start(0)
            for first in range(batch_rows, int(ends[-1]) + batch_rows, batch_rows):
                now, ahead = ahead, start(first) if first < ends[-1] else iter(())
                got = {name: values for part in now for name, values in part.items()}
                yield StoredHooks({h: self._float32(got[h]) for h in hooks}, *(got[c] for c in COLUMNS))

    def entity(self, code: int, hook: str) -> StoredRows:
        """Return the whole history of one entity, by position.

        Raises
        ------
        StoreError
            The entity or the hook is not in the store, or a file is damaged.
        """
        return self.entities([code], hook)

    def entities(self, codes: Sequence[int] | Int64[np.ndarray, " n"], hook: str) -> StoredRows:
        """Return the whole histories of some entities, sorted by (entity, position), without a scan.

        Raises
        ------
        StoreError
            An entity or the hook is not in the store, or a file is damaged.
        """
        self._check(hook)
        places = self._places(np.unique(np.asarray(codes, np.int64)))
        total = sum(len(rows) for _, _, rows in places)
        got = {
            name: np.empty((total, *self._specs[name].row_shape), self._specs[name].dtype)
            for name in (*COLUMNS, hook)
        }
        start = 0
        for writer, split, rows in places:
            for name, out in got.items():
                self.reader(writer, split, name).read_rows(rows, out[start : start + len(rows)])
            start += len(rows)
        order = np.lexsort((got["position"], got["entity"]))
        return StoredRows(self._float32(got[hook][order]), *(got[c][order] for c in COLUMNS))

    def entity_codes(self, split: str | None = None) -> Int64[np.ndarray, " entities"]:
        """Return the codes of all entities, or of those with rows in one split, ascending."""
        directory = self._merged()[0]
        if split is None:
            return np.unique(directory.entity)
        self._check(split=split)
        return np.unique(directory.entity[directory.split == directory.splits.index(split)])

    def blocks_with(self, codes: Int64[np.ndarray, " n"]) -> list[tuple[int, int]]:
        """Return writer and number of every block with rows of some entities; unknown ones have none."""
        directory = self._merged()[0]
        lines = np.isin(directory.entity, codes)
        pairs = np.stack([directory.writer[lines], directory.block[lines]], axis=1)
        return [(writer, block) for writer, block in np.unique(pairs, axis=0).tolist()]

    def entity_ids(self) -> pa.Table | None:
        """Return the table from codes to the user's ids; None if codes stand for themselves.

        Raises
        ------
        StoreError
            The file is damaged.
        """
        path = self.path / "entities.parquet"
        if "entities.parquet" not in self._files:
            return None
        if list(file_crc(path)) != self._files["entities.parquet"]:
            raise StoreError(f"{path} is damaged: its checksum does not match")
        return pq.read_table(path)

    def coordinates(
        self, split: str
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Return entity, position and time of every row of a split, in the order of `rows`."""
        self._check(split=split)
        table = self.chunks(split)
        ends = np.cumsum(table.rows)
        entity, position, time = (self._read_range(c, split, table, ends, 0, int(ends[-1])) for c in COLUMNS)
        return entity, position, time

    def verify(self) -> list[str]:
        """Read every byte and return what is wrong, one sentence per problem, each naming its file."""
        problems = [p for g in self.groups for p in checksum_problems(g.folder, self.description, g.commits)]
        for name, (size, crc) in self._files.items():
            if file_crc(self.path / name) != (size, crc):
                problems.append(f"{self.path / name} is damaged: its checksum does not match")
        remains = (folder for folder in beside_store(self.path.resolve()) if folder.exists())
        problems += [f"{folder} is what an interrupted erasure left: erase again" for folder in remains]
        return problems

    def chunks(self, split: str, blocks: Mapping[int, int] | None = None) -> ChunkTable:
        """Return the chunks of a split in storage order.

        Parameters
        ----------
        split
            The split.
        blocks
            How many blocks of each writer count; all by default.
        """
        writers, chunks, rows = [], [], []
        size, shard = self.description.geometry.chunk_rows, self.description.geometry.chunks_per_shard
        for group in self.groups:
            for commit in group.commits[: None if blocks is None else blocks.get(group.number, 0)]:
                if split in commit.splits:
                    part = commit.splits[split]
                    starts = np.arange(0, part.rows, size)
                    writers.append(np.full(len(starts), group.number, np.int64))
                    chunks.append(part.shard * shard + starts // size)
                    rows.append(np.minimum(size, part.rows - starts))
        none = [np.zeros(0, np.int64)]
        return ChunkTable(*(np.concatenate(none + parts) for parts in (writers, chunks, rows)))

    def reader(self, writer: int, split: str, name: str) -> ArrayReader:
        """Return the reader of one array: a hook or one of entity, position, time."""
        key = (writer, split, name)
        if key not in self._readers:
            folder = (
                next(g.folder for g in self.groups if g.number == writer) / split / self._specs[name].path
            )
            self._readers[key] = ArrayReader(folder, self._specs[name], self.description.geometry)
        return self._readers[key]

    def _read_range(
        self,
        name: str,
        split: str,
        table: ChunkTable,
        ends: Int64[np.ndarray, " chunks"],
        first: int,
        last: int,
    ) -> np.ndarray:
        spec = self._specs[name]
        out = np.empty((last - first, *spec.row_shape), spec.dtype)
        for c in range(int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last)) + 1):
            begin = int(ends[c] - table.rows[c])
            low, high = max(first, begin), min(last, int(ends[c]))
            reader = self.reader(int(table.writer[c]), split, name)
            reader.read(int(table.chunk[c]), low - begin, out[low - first : high - first])
        return out

    def _places(self, codes: Int64[np.ndarray, " n"]) -> list[tuple[int, str, Int64[np.ndarray, " rows"]]]:
        """Return, per block that holds some of the entities, writer, split and ascending row numbers."""
        directory = self._merged()[0]
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
            first = part[name].shard * self.description.geometry.shard_rows
            places.append((writer, name, first + np.sort(rows.astype(np.int64))))
        return places

    def _read_block(self, writer: int, block: int) -> tuple[dict[str, Any], dict[str, Any]]:
        group = next(g for g in self.groups if g.number == writer)
        commit = group.commits[block]
        return read_block(group.folder, commit), commit.splits

    def _read_merged(self) -> tuple[Directory, Mapping[str, Any]]:
        if not self.complete:
            return merge_blocks(self.description, self.groups)
        size, crc = self._files["index.safetensors"]
        directory = Directory.read(self.path / "index.safetensors", tuple(self.splits), size, crc)
        size, crc = self._files["moments.safetensors"]
        return directory, read_tensors(self.path / "moments.safetensors", size, crc)

    def _float32(self, rows: np.ndarray) -> Float32[np.ndarray, "rows d_in"]:
        return to_float32(rows, self.description.dtype)

    def _check(self, hook: str | None = None, split: str | None = None) -> None:
        for word, name, known in (("hook", hook, self.hooks), ("split", split, self.splits)):
            if name is not None and name not in known:
                raise StoreError(
                    f"{self.path} has no {word} {name!r}", expected=", ".join(known) or "nothing yet"
                )
