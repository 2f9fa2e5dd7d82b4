"""The blocks of one writer on their way to disk, in order, by threads of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from .block import BlockRows, PendingBlock, block_orders
from .commits import Commit, SplitBlock, end_rows, write_commit
from .copying import FileThreads
from .places import Lock, Place
from .schema import Description


class Block(NamedTuple):
    """Rows on their way to disk: which block they are, their splits, and where the source stands after them."""

    number: int
    rows: BlockRows
    codes: Int64[np.ndarray, " rows"]
    splits: tuple[str, ...]
    cursor: Any


class Committer:
    """Writes and commits blocks in order; at most two are between memory and their commit.

    Parameters
    ----------
    folder
        The writer's folder.
    description
        The store.
    commits
        What is committed already.
    seed
        Of the shuffling, with the number of the block behind it.
    ends
        Per split, the rows of the arrays behind which names are free.
    revisions
        Revision that a block begins with where it is not 0.
    lock
        Held by the writer.
    on_failure
        Called when a block cannot be written.

    Attributes
    ----------
    commits
        What is committed.
    failure
        The first error; nothing is written after it.
    """

    def __init__(
        self,
        folder: Place,
        description: Description,
        commits: Sequence[Commit],
        *,
        seed: tuple[int, ...],
        ends: Mapping[str, int],
        revisions: Mapping[int, int],
        lock: Lock,
        on_failure: Callable[[], None],
    ) -> None:
        self.commits = tuple(commits)
        self.failure: Exception | None = None
        self._folder, self._description, self._seed = folder, description, seed
        self._ends, self._revisions, self._lock = dict(ends), revisions, lock
        self._on_failure = on_failure
        self._begun = len(commits)
        self._pending: deque[Future[None]] = deque()
        self._files = FileThreads()
        self._beginner = ThreadPoolExecutor(1, thread_name_prefix="assay-block")
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="assay-commit")

    def write(self, block: Block) -> None:
        """Write a block, behind those before it; a block that was given already is left out."""
        self._beginner.submit(self._begin, block)

    def settle(self) -> None:
        """Wait until every block is committed.

        Raises
        ------
        StoreError
            One could not be: the disk is full, or somebody else took the store over.
        """
        self._beginner.submit(self._check).result()
        self._committer.submit(self._check).result()

    def close(self) -> None:
        """Let the threads end; nothing is written afterwards."""
        self._beginner.shutdown()
        self._committer.shutdown()
        self._files.close()

    def _begin(self, block: Block) -> None:
        with self._noting_failure():
            if block.number < self._begun:
                return
            while len(self._pending) > 1:
                self._pending.popleft().result()
            description, geometry = self._description, self._description.geometry
            seed = np.random.SeedSequence([*self._seed, block.number])
            rng = np.random.Generator(np.random.Philox(seed)) if description.shuffle else None
            orders = block_orders(
                block.rows.columns, block.codes, block.splits, rng=rng, run_length=description.run_length
            )
            starts = {
                name: SplitBlock(geometry.shards_of(self._ends.get(name, 0)), len(order), {})
                for name, order in orders.items()
            }
            revision = self._revisions.get(block.number, 0)
            commit = Commit(block.number, block.cursor, starts, 0, 0, revision)
            self._ends |= end_rows([commit], geometry)
            pending = PendingBlock(
                self._folder, description, block.rows, orders, commit=commit, threads=self._files
            )
            self._pending.append(self._committer.submit(self._commit, pending))
            self._begun += 1

    def _commit(self, pending: PendingBlock) -> None:
        """Wait for a block's files; nothing of it counts until its record has its name."""
        with self._noting_failure():
            commit = pending.finish()
            write_commit(self._folder, commit, self._lock)
            self.commits = (*self.commits, commit)

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """Do nothing after an error."""
        self._check()
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            self._on_failure()
            raise
