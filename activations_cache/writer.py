"""One process writes one group of a store: rows are buffered into blocks; a block exists once committed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Shaped

from sae.errors import ConfigError, StoreError

from .block import block_orders, write_block
from .commits import Commit, SplitBlock, end_rows, read_commits, write_metadata, writer_path
from .durable import PARTIAL, FileLock, write_record
from .formats import check_range, to_stored
from .schema import COLUMNS, Description, StoreLayout, check_split

SPLITS = ("fit", "discover", "confirm", "out_of_time")
_SPLIT = "/split"
_LATER = ("crc32c", "sealed", "splits", "erasures")


class CompleteError(StoreError):
    """The store is sealed."""


class _Block(NamedTuple):
    """Rows on their way to disk: which block they are, and where the source stands after them."""

    number: int
    rows: Mapping[str, np.ndarray]
    codes: Int64[np.ndarray, " rows"]
    cursor: Any


class _Progress(NamedTuple):
    """All that appending changes, replaced in one step, so that an interruption falls before or after it.

    Which buffers are being filled, how far, where the source stands after that, and the block before them.
    """

    side: int
    filled: int
    reached: Any
    sent: _Block | None


class StoreWriter:
    """Writes rows of activations so that nothing committed is ever lost and nothing is stored twice.

    Rows are buffered until the next `append` would pass the block size; then the block is shuffled (Philox of
    seed, writer and block), written and committed by a thread of its own while the next one is filled; so two
    blocks are in memory, and a few chunks. A block ends between two calls, and the cursor of the last commit
    says exactly where the source has to continue. As a context manager it commits what is buffered at the
    end, also when its body is interrupted.

    Parameters
    ----------
    path
        The store; created by whichever writer comes first.
    hooks
        Width of each hook.
    layout
        Layout on disk.
    seed
        Of the shuffling at write time.
    provenance
        JSON values that say where the activations come from. A writer that continues a store has to give the
        same, so nothing that differs between two starts of one harvest (a time of day, a rank) belongs here.
    writer
        This writer's number; every process has its own.
    run_length
        Runs of so many consecutive rows of one entity stay together in the shuffling.
    splits
        Names that integers in `append(split=...)` count through.

    Raises
    ------
    StoreError
        The store was begun with other settings, is sealed or damaged, or another writer holds this group.
    """

    def __init__(
        self,
        path: Path,
        *,
        hooks: Mapping[str, int],
        layout: StoreLayout,
        seed: int,
        provenance: Mapping[str, Any],
        writer: int = 0,
        run_length: int = 1,
        splits: Sequence[str] = SPLITS,
    ) -> None:
        self.folder, self.writer = writer_path(path, writer), writer
        self._names = [check_split(name) for name in splits]
        wanted = describe(hooks, layout, seed=seed, provenance=provenance, run_length=run_length)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock")
        try:
            self.description = _begin(path, wanted)
            (self.folder / "commits").mkdir(exist_ok=True)
            commits = tuple(read_commits(self.folder))
            sweep(self.folder, commits, self.description)
        except BaseException:
            self._lock.release()
            raise
        self._commits = commits
        self._progress = _Progress(side=0, filled=0, reached=None, sent=None)
        self._size = self.description.geometry.block_rows
        # the memory of the second is taken only once it is filled
        self._buffers = [_buffers(self.description, self._size) for _ in range(2)]
        self._failure: Exception | None = None
        self._told = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="assay-commit")

    @property
    def cursor(self) -> Any:
        """The source cursor after the last committed row, None at first; as from JSON: tuples are lists."""
        commits = self._commits
        return json.loads(json.dumps(commits[-1].cursor)) if commits else None

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(commit.rows for commit in self._commits)

    def append(
        self,
        acts: Mapping[str, Float[np.ndarray, "rows _d_in"]],
        *,
        entity: Int64[np.ndarray, " rows"],
        position: Int64[np.ndarray, " rows"],
        time: Int64[np.ndarray, " rows"],
        split: Shaped[np.ndarray, " rows"],
        cursor: Any,
    ) -> None:
        """Take rows; they are durable once `cursor` of this object has reached the one given here.

        An error of the block before, such as a full disk, is raised by the call that would send the next one.

        Parameters
        ----------
        acts
            One array per hook, all of the same rows.
        entity, position, time
            Who and when, per row; entity codes are not negative.
        split
            Names, or integers that count through the writer's `splits`.
        cursor
            Where the source stands after these rows: any JSON value.

        Raises
        ------
        StoreError
            A value is not finite or does not fit the format on disk, shapes disagree, or the disk is full.
        """
        if self._failure is not None and not self._told:
            self._settle()
        if self._told or self._lock.released:
            raise StoreError(
                f"{self.folder}: this writer has ended",
                do="open a new one; it continues after the last commit",
            )
        json.dumps(cursor)
        given = {"entity": entity, "position": position, "time": time}
        columns = {name: np.asarray(value, np.int64) for name, value in given.items()}
        n = len(columns["entity"])
        self._check_shapes(acts, columns, np.asarray(split))
        codes = self._split_codes(np.asarray(split))
        for hook in self.description.hooks:
            check_range(hook, acts[hook], self.description.dtype, columns)
        if self._progress.filled + n > self._size:
            self._flush()
        side, filled, _, sent = self._progress
        big = n > self._size
        buffers = _buffers(self.description, n) if big else self._buffers[side]
        here = slice(0, n) if big else slice(filled, filled + n)
        for name, column in {**columns, _SPLIT: codes}.items():
            buffers[name][here] = column
        for hook in self.description.hooks:
            to_stored(acts[hook], buffers[hook][here], self.description.dtype)
        if big:
            self._send(buffers, n, cursor)
        else:
            self._progress = _Progress(side, filled + n, cursor, sent)

    def close(self) -> None:
        """Commit what is buffered, write the zarr metadata, let go of the group; again does nothing."""
        if self._lock.released:
            return
        try:
            if not self._told:
                self._flush()
                self._settle()
                write_metadata(self.folder, self.description, self._commits)
        finally:
            # nobody else may write here before the thread has ended
            self._thread.shutdown()
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        side, filled, reached, _ = self._progress
        if filled:
            self._send(self._buffers[side], filled, reached)

    def _send(self, buffers: Mapping[str, np.ndarray], n: int, cursor: Any) -> None:
        """Let the thread write a block, once the one before is written, and go on with the other buffers."""
        self._settle()
        rows = {name: buffer[:n] for name, buffer in buffers.items()}
        block = _Block(len(self._commits), rows, rows.pop(_SPLIT), cursor)
        # noted first: an interruption before the thread has it leaves it to `_settle`
        self._progress = _Progress(1 - self._progress.side, 0, None, block)
        self._thread.submit(self._write, block)

    def _settle(self) -> None:
        """Wait until the block that was sent is committed."""
        block = self._progress.sent
        if block is None:
            return
        try:
            self._thread.submit(self._write, block).result()
        except BaseException as error:
            self._told = error is self._failure
            raise

    def _write(self, block: _Block) -> None:
        """Write a block unless it is written; nothing of it counts until its record has its name."""
        if self._failure is not None:
            raise self._failure
        if block.number < len(self._commits):
            return
        description, geometry = self.description, self.description.geometry
        seed = np.random.SeedSequence([description.seed, self.writer, block.number])
        rng = np.random.Generator(np.random.Philox(seed)) if description.shuffle else None
        orders = block_orders(
            block.rows, block.codes, self._names, rng=rng, run_length=description.run_length
        )
        ends = end_rows(self._commits, geometry)
        starts = {
            name: SplitBlock(geometry.shards_of(ends.get(name, 0)), len(o), {}) for name, o in orders.items()
        }
        try:
            commit = Commit(block.number, block.cursor, starts, extra_bytes=0, extra_crc=0)
            commit = write_block(self.folder, description, block.rows, orders, commit=commit)
            write_record(self.folder / "commits" / commit.record_name, commit.body())
        except Exception as error:
            self._failure = error
            raise
        self._commits = (*self._commits, commit)

    def _check_shapes(
        self, acts: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray], split: np.ndarray
    ) -> None:
        n = len(columns["entity"])
        want: dict[str, tuple[int, ...]] = {**dict.fromkeys(COLUMNS, (n,)), "split": (n,)}
        want |= {hook: (n, width) for hook, width in self.description.hooks.items()}
        got = {name: tuple(np.shape(a)) for name, a in {**columns, "split": split, **acts}.items()}
        if got != want:
            raise StoreError("the rows given to the store do not fit it", got=str(got), expected=str(want))
        if n and columns["entity"].min() < 0:
            raise StoreError(
                "an entity code is negative", got=str(columns["entity"].min()), expected="0 or more"
            )

    def _split_codes(self, split: np.ndarray) -> Int64[np.ndarray, " rows"]:
        if split.dtype.kind in "iu":
            if split.size and not 0 <= split.min() <= split.max() < len(self._names):
                raise StoreError(
                    "a split number has no name",
                    got=str(split.max()),
                    expected=f"0 to {len(self._names) - 1}",
                )
            return split.astype(np.int64)
        names, inverse = np.unique(split.astype(str), return_inverse=True)
        for name in names.tolist():
            if name not in self._names:
                self._names.append(check_split(name))
        return np.array([self._names.index(name) for name in names.tolist()], np.int64)[inverse]


def _buffers(description: Description, rows: int) -> dict[str, np.ndarray]:
    """Return memory for rows in the format on disk, with the number of each one's split."""
    specs = description.arrays()
    buffers = {name: np.empty((rows, *spec.row_shape), spec.dtype) for name, spec in specs.items()}
    return {**buffers, _SPLIT: np.empty(rows, np.int64)}


def sweep(folder: Path, commits: Sequence[Commit], description: Description) -> None:
    """Remove what a killed writer left behind: half-written files, and files that no commit names."""
    keep = {folder / "blocks" / commit.extra_name for commit in commits}
    specs = description.arrays().values()
    for commit in commits:
        for split, part in commit.splits.items():
            numbers = range(part.shard, part.shard + description.geometry.shards_of(part.rows))
            keep |= {folder / split / spec.path / spec.shard_name(n) for spec in specs for n in numbers}
    for path in folder.rglob("*"):
        data = re.fullmatch(r"c\.\d+(\.0)?", path.name) or path.parent.name == "blocks"
        if path.name.endswith(PARTIAL) or (data and path not in keep and path.is_file()):
            path.unlink()


def describe(
    hooks: Mapping[str, int],
    layout: StoreLayout,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    run_length: int = 1,
) -> Description:
    """Return what the root of a store says that is begun with these settings; see `StoreWriter`.

    Raises
    ------
    ConfigError
        There is no hook, or a number is out of range.
    """
    if not hooks or run_length < 1 or seed < 0:
        got = f"hooks {list(hooks)}, run_length {run_length}, seed {seed}"
        raise ConfigError(
            "a store needs a hook, a run length of at least 1 and a seed of at least 0", got=got
        )
    return Description(
        hooks=dict(hooks),
        dtype=layout.dtype,
        geometry=layout.geometry(hooks),
        seed=seed,
        run_length=run_length,
        provenance=json.loads(json.dumps(dict(provenance))),
        shuffle=layout.shuffle,
        covariance=layout.covariance,
        retain_until=layout.retain_until.isoformat() if layout.retain_until else "",
        data_licence=layout.data_licence,
    )


def _begin(path: Path, wanted: Description) -> Description:
    """Create the root group, or check that the one that is there was begun in the same way."""
    with FileLock(path / "lock", wait=True):
        if not (path / "zarr.json").exists():
            wanted.write(path)
            return wanted
        found = Description.read(path)
    if found.sealed:
        raise CompleteError(
            f"{path} is complete; nothing can be added to it", do="harvest into another place"
        )
    check_same(path, found, wanted)
    return found


def check_same(path: Path, found: Description, wanted: Description) -> None:
    """Check that a store was begun with the settings wanted.

    Raises
    ------
    StoreError
        It was not; the message says which differ.
    """
    a, b = found.attributes(), wanted.attributes()
    differ = [key for key in b if a[key] != b[key] and key not in _LATER]
    if differ:
        raise StoreError(
            f"{path} was begun with other settings",
            got="; ".join(f"{key} {b[key]}" for key in differ),
            expected="; ".join(f"{key} {a[key]}" for key in differ),
            do="harvest with the settings it was begun with, or into another place",
        )
