"""One process writes one group of a store: rows are buffered into blocks; a block exists once committed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Shaped

from sae.errors import StoreError

from .begin import begin, describe, unused_names
from .block import BlockRows
from .buffer import FreeSlots, RowBuffer
from .commits import read_commits, write_metadata, writer_path
from .committer import Block, Committer
from .formats import check_range
from .places import Location, place_of
from .schema import COLUMNS, StoreLayout, check_split

SPLITS = ("fit", "discover", "confirm", "out_of_time")


class _Part(NamedTuple):
    """Rows of one call: who, when and of which split, and their slots in the buffer."""

    columns: Mapping[str, Int64[np.ndarray, " rows"]]
    codes: Int64[np.ndarray, " rows"]
    slots: Int64[np.ndarray, " rows"]


class _Progress(NamedTuple):
    """All that appending changes, replaced in one step, so that an interruption falls before or after it.

    What is buffered since the last block, where the source stands after that, the slots that are free, the
    number of blocks sent and the last of them.
    """

    parts: tuple[_Part, ...]
    filled: int
    reached: Any
    free: FreeSlots
    blocks: int
    sent: Block | None


class StoreWriter:
    """Writes rows of activations so that nothing committed is ever lost and nothing is stored twice.

    Rows are buffered until the next `append` would pass the block size; then the block is shuffled (Philox of
    seed, writer and block), written and committed by other threads while the next one is filled. The next
    one's rows go where rows were that are written already, so the memory of one block is enough, and a few
    chunks. A block ends between two calls, and the cursor of the last commit says exactly where the source
    has to continue. As a context manager it commits what is buffered at the end, but not when its body is
    interrupted: a block ends where it would have ended, so a store that was continued has the bits of one that was
    not interrupted.

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
        path: Location,
        *,
        hooks: Mapping[str, int],
        layout: StoreLayout,
        seed: int,
        provenance: Mapping[str, Any],
        writer: int = 0,
        run_length: int = 1,
        splits: Sequence[str] = SPLITS,
    ) -> None:
        store = place_of(path)
        self.folder, self.writer = writer_path(store, writer), writer
        self._names = [check_split(name) for name in splits]
        wanted = describe(hooks, layout, seed=seed, provenance=provenance, run_length=run_length)
        self._lock = (self.folder / "lock").lock()
        try:
            self.description = begin(store, wanted)
            commits = tuple(read_commits(self.folder))
            ends, revisions = unused_names(self.folder, commits, self.description, self._lock)
        except BaseException:
            self._lock.release()
            raise
        self._size = self.description.geometry.block_rows
        specs = {hook: self.description.arrays()[hook] for hook in self.description.hooks}
        self._buffer = RowBuffer(specs, self._size)
        self._progress = _Progress((), 0, None, self._buffer.all_free, len(commits), None)
        self._blocks = Committer(
            self.folder,
            self.description,
            commits,
            seed=(self.description.seed, writer),
            ends=ends,
            revisions=revisions,
            lock=self._lock,
            on_failure=self._buffer.wake,
        )
        self._told = False

    @property
    def cursor(self) -> Any:
        """The source cursor after the last committed row, None at first; as from JSON: tuples are lists."""
        commits = self._blocks.commits
        return json.loads(json.dumps(commits[-1].cursor)) if commits else None

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(commit.rows for commit in self._blocks.commits)

    @property
    def wait_seconds(self) -> float:
        """Time that `append` has waited for blocks on their way to disk."""
        return self._buffer.wait_seconds

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

        An error of an earlier block, such as a full disk, is raised by the next call.

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
        self._check_alive()
        json.dumps(cursor)
        given = {"entity": entity, "position": position, "time": time}
        # copies: the caller may use its arrays again
        columns = {name: np.array(value, np.int64) for name, value in given.items()}
        n = len(columns["entity"])
        self._check_shapes(acts, columns, np.asarray(split))
        codes = self._split_codes(np.asarray(split))
        for hook in self.description.hooks:
            check_range(hook, acts[hook], self.description.dtype, columns)
        if self._progress.filled + n > self._size:
            self._flush()
        if n > self._size:
            self._send_alone(acts, columns, codes, cursor)
            return
        before = self._progress
        slots, free = self._buffer.take(before.free, n, check=self._check_alive)
        for hook in self.description.hooks:
            self._buffer.put(hook, slots, acts[hook])
        parts = (*before.parts, _Part(columns, codes, slots))
        self._progress = before._replace(parts=parts, filled=before.filled + n, reached=cursor, free=free)

    def close(self) -> None:
        """Commit what is buffered, write the zarr metadata, let go of the group; again does nothing."""
        self._end(whole=True)

    def _end(self, *, whole: bool) -> None:
        """Commit the blocks that were sent, and what is buffered if the source is `whole`; then let go."""
        if self._lock.released:
            return
        try:
            if not self._told:
                if whole:
                    self._flush()
                self._settle()
                # where a lock can be lost, only seal writes what is not written once
                if self._lock.final:
                    write_metadata(self.folder, self.description, self._blocks.commits)
        finally:
            # nobody else may write here before the threads have ended
            self._blocks.close()
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(whole=error is None)

    def _check_alive(self) -> None:
        """Raise the error of an earlier block, once, and then that this writer has ended."""
        failure = self._blocks.failure
        if failure is not None and not self._told:
            self._told = True
            raise failure
        if self._told or self._lock.released:
            raise StoreError(
                f"{self.folder}: this writer has ended",
                do="open a new one; it continues after the last commit",
            )

    def _flush(self) -> None:
        """Send what is buffered."""
        parts, filled, reached, *_ = self._progress
        if filled:
            columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
            slots = np.concatenate([part.slots for part in parts])
            rows = BlockRows(columns, self._buffer.arrays, slots, self._buffer.give_back)
            self._send(rows, np.concatenate([part.codes for part in parts]), reached)

    def _send_alone(
        self,
        acts: Mapping[str, np.ndarray],
        columns: Mapping[str, Int64[np.ndarray, " rows"]],
        codes: Int64[np.ndarray, " rows"],
        cursor: Any,
    ) -> None:
        """Send rows that are more than the buffer holds as a block with memory of its own."""
        self._settle()
        n, hooks = len(codes), self.description.hooks
        own = RowBuffer({hook: self.description.arrays()[hook] for hook in hooks}, n)
        for hook in hooks:
            own.put(hook, own.all_free.slots, acts[hook])
        self._send(BlockRows(columns, own.arrays, own.all_free.slots), codes, cursor)

    def _send(self, rows: BlockRows, codes: Int64[np.ndarray, " rows"], cursor: Any) -> None:
        """Let other threads write a block, and go on."""
        self._hand_over()
        before = self._progress
        block = Block(before.blocks, rows, codes, tuple(self._names), cursor)
        # noted first: an interruption before the threads have it leaves it to the next call
        self._progress = before._replace(
            parts=(), filled=0, reached=None, blocks=before.blocks + 1, sent=block
        )
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the block that was sent last to the threads; again does nothing."""
        if self._progress.sent is not None:
            self._blocks.write(self._progress.sent)

    def _settle(self) -> None:
        """Wait until everything that was sent is committed."""
        self._hand_over()
        try:
            self._blocks.settle()
        except BaseException as error:
            self._told = self._told or error is self._blocks.failure
            raise

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
