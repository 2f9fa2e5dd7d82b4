"""A store of activations, opened for reading: splits in storage order, histories in order of position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from sae.errors import StoreError

from .chunks import ChunkTable, list_chunks
from .commits import Group, read_groups, split_rows
from .durable import crc32c
from .formats import to_float32
from .index import Directory, RowFinder, read_tensors
from .moments import Moments
from .places import LocalPlace, Location, Place, place_of
from .records import file_crc, read_record, record_crc
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


class ActivationStore:
    """Activations on disk.

    Attributes
    ----------
    path
        Where it lies.
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
        self, path: Place, description: Description, groups: list[Group], files: Mapping[str, list[int]]
    ) -> None:
        self.path, self.description, self.groups = path, description, groups
        self.hooks = description.hooks
        self.splits = split_rows(groups)
        self.n_rows = sum(self.splits.values())
        self.provenance = description.provenance
        self.complete = description.sealed
        self._files = dict(files)
        self._folders = {group.number: group.folder for group in groups}
        self._readers: dict[tuple[int, str, str], ArrayReader] = {}
        self._specs = description.arrays()

    @classmethod
    def open(cls, path: Location, *, allow_incomplete: bool = False) -> ActivationStore:
        """Open a store after checking its manifest, every record, and the size of every file.

        Parameters
        ----------
        path
            The store: a folder, a URL such as s3://bucket/prefix, or a file that stands for one.
        allow_incomplete
            Whether a harvest that has not ended may be read, as far as it is committed.

        Raises
        ------
        StoreError
            There is no store, it is incomplete, or it is damaged; each damaged file is named.
        """
        path = place_of(path)
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
        return Moments.from_tensors(self._merged[1], f"{split}/{hook}")

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
        names, table = [*COLUMNS, *hooks], self.chunks(split)
        with ThreadPoolExecutor(self.path.threads, thread_name_prefix="assay-read") as pool:

            def start(first: int) -> tuple[dict[str, np.ndarray], list[Future[None]]]:
                got, reads = self._reads(names, split, table, first, min(first + batch_rows, table.total))
                return got, [pool.submit(read) for read in reads]

            ahead = start(0)
            for first in range(batch_rows, table.total + batch_rows, batch_rows):
                (got, reading), ahead = ahead, start(first) if first < table.total else ({}, [])
                for future in reading:
                    future.result()
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
        places = self._finder.rows(np.unique(np.asarray(codes, np.int64)))
        total = sum(len(rows) for _, _, rows in places)
        got = self._empty([*COLUMNS, hook], total)
        reads, start = [], 0
        for writer, split, rows in places:
            for name, out in got.items():
                read = self.reader(writer, split, name).read_rows
                reads.append(partial(read, rows, out[start : start + len(rows)]))
            start += len(rows)
        self.path.map(lambda read: read(), reads)
        order = np.lexsort((got["position"], got["entity"]))
        return StoredRows(self._float32(got[hook][order]), *(got[c][order] for c in COLUMNS))

    def entity_codes(self, split: str | None = None) -> Int64[np.ndarray, " entities"]:
        """Return the codes of all entities, or of those with rows in one split, ascending."""
        self._check(split=split)
        return self._finder.codes(split)

    def blocks_with(self, codes: Int64[np.ndarray, " n"]) -> list[tuple[int, int]]:
        """Return writer and number of every block with rows of some entities; unknown ones have none."""
        return self._finder.blocks(codes)

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
        data = path.read()
        if [len(data), crc32c(data)] != self._files["entities.parquet"]:
            raise StoreError(f"{path} is damaged: its checksum does not match")
        return pq.read_table(pa.BufferReader(data))

    def coordinates(
        self, split: str
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Return entity, position and time of every row of a split, in the order of `rows`."""
        self._check(split=split)
        table = self.chunks(split)
        got, reads = self._reads(COLUMNS, split, table, 0, table.total)
        self.path.map(lambda read: read(), reads)
        return got["entity"], got["position"], got["time"]

    def verify(self) -> list[str]:
        """Read every byte and return what is wrong, one sentence per problem, each naming its file."""
        problems = [p for g in self.groups for p in checksum_problems(g.folder, self.description, g.commits)]
        for name, (size, crc) in self._files.items():
            if file_crc(self.path / name) != (size, crc):
                problems.append(f"{self.path / name} is damaged: its checksum does not match")
        if isinstance(self.path, LocalPlace):
            remains = (folder for folder in beside_store(self.path.path.resolve()) if folder.exists())
            problems += [f"{folder} is what an interrupted erasure left: erase again" for folder in remains]
        return problems

    def chunks(self, split: str, blocks: Mapping[int, int] | None = None) -> ChunkTable:
        """Return the chunks of a split in storage order; of each writer the first `blocks` count."""
        return list_chunks(self.groups, self.description.geometry, split, blocks)

    def reader(self, writer: int, split: str, name: str) -> ArrayReader:
        """Return the reader of one array: a hook or one of entity, position, time."""
        key = (writer, split, name)
        if key not in self._readers:
            folder, spec = self._folders[writer] / split, self._specs[name]
            self._readers[key] = ArrayReader(folder / spec.path, spec, self.description.geometry)
        return self._readers[key]

    def _reads(
        self, names: Sequence[str], split: str, table: ChunkTable, first: int, last: int
    ) -> tuple[dict[str, np.ndarray], list[Callable[[], None]]]:
        """Return arrays for rows `first` .. `last` of a split, and what fills them."""
        got = self._empty(names, last - first)
        reads: list[Callable[[], None]] = [
            partial(self.reader(piece.writer, split, name).read, piece.chunk, piece.start, out[piece.into])
            for piece in table.pieces(first, last)
            for name, out in got.items()
        ]
        return got, reads

    def _empty(self, names: Sequence[str], rows: int) -> dict[str, np.ndarray]:
        specs = {name: self._specs[name] for name in names}
        return {name: np.empty((rows, *spec.row_shape), spec.dtype) for name, spec in specs.items()}

    @cached_property
    def _finder(self) -> RowFinder:
        return RowFinder(self._merged[0], self.groups, self.description.geometry)

    @cached_property
    def _merged(self) -> tuple[Directory, Mapping[str, Any]]:
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
