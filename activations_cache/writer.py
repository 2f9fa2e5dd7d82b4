"""One process writes one group of a store: rows are buffered into blocks; a block exists once committed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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


class _Progress(NamedTuple):
    """All that changes, replaced in one step, so that an interruption falls before or after it.

    The committed blocks, the rows in the buffers, and where the source stands after those.
    """

    commits: tuple[Commit, ...]
    filled: int
    reached: Any


class StoreWriter:
    """Writes rows of activations so that nothing committed is ever lost and nothing is stored twice.

    Rows are buffered until the next `append` would pass the block size; then the block is shuffled (Philox of
    seed, writer and block), written and committed. So a block ends between two calls, and the cursor of the
    last commit says exactly where the source has to continue. As a context manager it commits what is
    buffered at the end, also when its body is interrupted.

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
        wanted = _describe(hooks, layout, seed, provenance, run_length)
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
        self._progress = _Progress(commits, filled=0, reached=None)
        specs = self.description.arrays()
        self._size = self.description.geometry.block_rows
        self._buffers = {name: np.empty((self._size, *s.row_shape), s.dtype) for name, s in specs.items()}
        self._codes = np.empty(self._size, np.int64)
        self._failed = False

    @property
    def cursor(self) -> Any:
        """The source cursor after the last committed row, None at first; as from JSON: tuples are lists."""
        commits = self._progress.commits
        return json.loads(json.dumps(commits[-1].cursor)) if commits else None

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(commit.rows for commit in self._progress.commits)

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
        if self._failed or self._lock.released:
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
        if n > self._size:
            stored = {h: np.empty(acts[h].shape, self._buffers[h].dtype) for h in self.description.hooks}
            for hook, rows in stored.items():
                to_stored(acts[hook], rows, self.description.dtype)
            self._commit({**columns, **stored}, codes, cursor)
            return
        filled = self._progress.filled
        here = slice(filled, filled + n)
        for name, column in columns.items():
            self._buffers[name][here] = column
        for hook in self.description.hooks:
            to_stored(acts[hook], self._buffers[hook][here], self.description.dtype)
        self._codes[here] = codes
        self._progress = self._progress._replace(filled=filled + n, reached=cursor)

    def close(self) -> None:
        """Commit what is buffered, write the zarr metadata, let go of the group; again does nothing."""
        if self._lock.released:
            return
        try:
            if not self._failed:
                self._flush()
                write_metadata(self.folder, self.description, self._progress.commits)
        finally:
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        _, filled, reached = self._progress
        if filled:
            rows = {name: buffer[:filled] for name, buffer in self._buffers.items()}
            self._commit(rows, self._codes[:filled], reached)

    def _commit(self, rows: Mapping[str, np.ndarray], codes: Int64[np.ndarray, " rows"], cursor: Any) -> None:
        """Write one block; nothing of it counts until its record has its name, so it can be repeated."""
        commits = self._progress.commits
        block = len(commits)
        seed = np.random.SeedSequence([self.description.seed, self.writer, block])
        rng = np.random.Generator(np.random.Philox(seed)) if self.description.shuffle else None
        orders = block_orders(rows, codes, self._names, rng=rng, run_length=self.description.run_length)
        geometry = self.description.geometry
        ends = end_rows(commits, geometry)
        starts = {
            name: SplitBlock(geometry.shards_of(ends.get(name, 0)), len(o), {}) for name, o in orders.items()
        }
        try:
            commit = Commit(block, cursor, starts, extra_bytes=0, extra_crc=0)
            commit = write_block(self.folder, self.description, rows, orders, commit=commit)
            write_record(self.folder / "commits" / f"{block:08d}.json", commit.body())
        except Exception:
            self._failed = True
            raise
        self._progress = _Progress((*commits, commit), filled=0, reached=None)

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


def _describe(
    hooks: Mapping[str, int], layout: StoreLayout, seed: int, provenance: Mapping[str, Any], run_length: int
) -> Description:
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
        raise StoreError(f"{path} is complete; nothing can be added to it", do="harvest into another place")
    if found != wanted:
        a, b = found.attributes(), wanted.attributes()
        differ = [key for key in b if a[key] != b[key] and key != "crc32c"]
        raise StoreError(
            f"{path} was begun with other settings",
            got="; ".join(f"{key} {b[key]}" for key in differ),
            expected="; ".join(f"{key} {a[key]}" for key in differ),
            do="harvest with the settings it was begun with, or into another place",
        )
    return found
