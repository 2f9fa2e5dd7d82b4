"""Shuffled batches from a store: constant size, no end, the same for any number of ranks, resumable."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from jaxtyping import Float, Float32, Int64
from pydantic import Field
from torch import Tensor

from sae.config import Config
from sae.errors import CheckpointError, ConfigError, StoreError
from sae.world import World

from .balance import EntityBalance
from .batches import BatchMemory
from .order import Order
from .ring import Ring
from .schema import COLUMNS
from .selection import Selection
from .store import ActivationStore
from .windows import Gathering, Windows

_WINDOW_BYTES = 512 << 20
_SLICE_BYTES = 8 << 10


class LoaderConfig(Config):
    """How shuffled batches are read."""

    window_rows: int = Field(default=0, ge=0)
    """Rows in memory from which batches are drawn, over all ranks; twice as many are held. 0 = 512 MiB worth.
    A split that fits is shuffled whole and read once."""
    lanes: int = Field(default=16, ge=1)
    """Independent streams that a batch is put together from; the number of ranks has to divide it."""
    threads: int = Field(default=0, ge=0)
    """Threads that read ahead; 0 = as many as keep the place busy: 2 for a disk, 16 for an object store."""
    entity_rows: int = Field(default=0, ge=0)
    """Rows that an epoch serves of one entity at most, so that long histories do not dominate: spread over its
    history, others in the next epoch. 0 = all. Takes a byte of memory per row of the split."""


class LoadedBatch(NamedTuple):
    """One rank's rows of a batch.

    Attributes
    ----------
    acts
        Activations per hook, on the world's device, in the number format of the store.
    entity, position, time
        Whom and when each row is about, on the CPU; None unless coordinates were asked for.
    """

    acts: dict[str, Float[Tensor, "rows _d_in"]]
    entity: Int64[Tensor, " rows"] | None
    position: Int64[Tensor, " rows"] | None
    time: Int64[Tensor, " rows"] | None

    @property
    def x(self) -> Float32[Tensor, "rows d_in"]:
        """Activations of the only hook, as float32."""
        (only,) = self.acts.values()
        return only.float()


class ShuffledLoader:
    """Serves a split in a random order, every row once an epoch.

    Batches have a constant size and run on without end: the last batch of an epoch is filled up with the
    first rows of the next. The global order is a function of (store, seed, batch_size, settings, run_length)
    alone: the ranks' parts of batch t, one after the other, are batch t of a single process.

    Parameters
    ----------
    store
        What to read.
    hooks
        One hook or several.
    split
        Which rows.
    batch_size
        Rows of a batch over all ranks.
    seed
        Of the order.
    world
        Ranks along `data` share out each batch; ranks along `feature` get the same rows.
    run_length
        Runs of so many consecutive rows of one entity stay together, in order; the store has to be written
        with at least this run length. A run may be cut at the end of a chunk, a lane's share or a batch.
    coordinates
        Whether batches carry entity, position and time; always so where runs are kept together.
    settings
        Memory, lanes, threads, and how often an entity is served.

    Attributes
    ----------
    batch
        Number of the next batch.
    rows_per_epoch
        Rows of the split, or of those the ones that an epoch serves.
    batches_per_epoch
        Batches that hold them, rounded up.
    wait_seconds
        Time that callers have spent waiting for a batch.

    Raises
    ------
    StoreError
        The store has no such hook or split, or was written with shorter runs.
    ConfigError
        The ranks cannot share out the batch, or runs are to be kept of which only some rows are served.
    """

    def __init__(  # noqa: PLR0913 - what is read, in which order, by whom, with what
        self,
        store: ActivationStore,
        hooks: str | Sequence[str],
        split: str,
        *,
        batch_size: int,
        seed: int,
        world: World,
        run_length: int = 1,
        coordinates: bool = False,
        settings: LoaderConfig | None = None,
    ) -> None:
        self.store, self.split = store, split
        self.hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
        self.batch_size, self.seed, self.run_length = batch_size, seed, run_length
        self.settings = settings or LoaderConfig()
        self._device = world.device
        self._ranks = world.axes["data"]
        self._rank = world.rank // world.axes["feature"]
        self._coordinates = coordinates or run_length > 1
        _check(store, self.hooks, split, run_length)
        self._specs = store.description.arrays()
        if run_length > 1 and self.settings.entity_rows:
            raise ConfigError("entity_rows leaves rows out, so runs of rows cannot be kept", do="choose one")
        threads = self.settings.threads or store.path.threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="assay-read")
        self.batch = 0
        self.wait_seconds = 0.0
        self._batches: Gathering | Ring | None = None
        self._freeze({group.number: len(group.commits) for group in store.groups})

    @property
    def epoch(self) -> int:
        """Epoch that the first row of the next batch belongs to."""
        return self.batch * self.batch_size // self.rows_per_epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch serves."""
        return self._order.rows

    @property
    def batches_per_epoch(self) -> int:
        """Batches that an epoch takes, rounded up."""
        return -(-self._order.rows // self.batch_size)

    def __iter__(self) -> Iterator[LoadedBatch]:
        """Yield the batches that are left of the current epoch: those that begin in it."""
        epoch = self.epoch
        while self.epoch == epoch:
            yield self.next_batch()

    def batches(self, n: int) -> Iterator[LoadedBatch]:
        """Yield the next n batches, across epochs."""
        for _ in range(n):
            yield self.next_batch()

    def next_batch(self) -> LoadedBatch:
        """Return the next batch; those after it are prepared meanwhile.

        Raises
        ------
        StoreError
            A chunk of the store is missing or damaged; asked again, the loader tries the same batch again.
        """
        started = clock.perf_counter()
        try:
            if self._batches is None:
                self._batches = self._begin()
            rows = self._batches.take(self.batch)
        except BaseException:
            # what is still being read goes into memory that nobody looks at any more
            self._stop()
            raise
        self.batch += 1
        acts = {hook: rows[hook].to(self._device, non_blocking=True) for hook in self.hooks}
        self.wait_seconds += clock.perf_counter() - started
        return LoadedBatch(acts, *(rows.get(name) for name in COLUMNS))

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as plain values of constant size."""
        form, settings = _form(self._slice_rows), self._identity()
        return {**form, **settings, "epoch": self.epoch, "batch": self.batch, "frozen": self._frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken, whatever the number of ranks was then.

        Raises
        ------
        CheckpointError
            The state was taken with other settings, or from a store whose rows are no longer the same.
        """
        _refuse_others(state, self._identity())
        groups = {group.folder.name: group for group in self.store.groups}
        for name, (blocks, digest) in state["frozen"].items():
            if (
                name not in groups
                or len(groups[name].commits) < blocks
                or groups[name].digest(blocks) != digest
            ):
                raise CheckpointError(
                    f"{self.store.path} no longer holds the rows that the saved position counts through",
                    got=f"{name} has changed",
                    do="start the training again",
                )
        frozen = {groups[name].number: blocks for name, (blocks, _) in state["frozen"].items()}
        _refuse_others(state, _form(self._choose_slices(self.store.chunks(self.split, frozen).total)))
        self._stop()
        self._freeze(frozen)
        self.batch = int(state["batch"])

    def close(self) -> None:
        """Stop reading ahead; the loader serves nothing afterwards."""
        self._stop()
        self._pool.shutdown()

    def _identity(self) -> dict[str, Any]:
        """Return the settings that the order depends on."""
        return {
            "hooks": list(self.hooks),
            "split": self.split,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "run_length": self.run_length,
            "entity_rows": self.settings.entity_rows,
            "lanes": self.settings.lanes,
            "window_rows": self._window_rows(),
        }

    def _window_rows(self) -> int:
        row_bytes = sum(self._specs[hook].row_bytes for hook in self.hooks)
        return self.settings.window_rows or max(1, _WINDOW_BYTES // row_bytes)

    def _choose_slices(self, rows: int) -> int:
        """Return how many stored rows are served as a slice; 0 where single rows are gathered from a window.

        Where rows were shuffled one by one when they were written, those of a slice are random rows of a block.
        Pieces of a hook have 8 KiB on average: a file is read into ones below 4 KiB at less than its full speed.
        """
        stored, gathered = self.store.description, self.run_length > 1 or self.settings.entity_rows
        if rows <= self._window_rows() or gathered or not stored.shuffle or stored.run_length > 1:
            return 0
        wanted = len(self.hooks) * _SLICE_BYTES / sum(self._specs[hook].row_bytes for hook in self.hooks)
        share = self.batch_size // math.gcd(self.settings.lanes, self.batch_size)
        return 1 << min((math.ceil(wanted) - 1).bit_length(), share.bit_length() - 1)

    def _freeze(self, blocks: dict[int, int]) -> None:
        """Fix which rows there are, and with them the order."""
        table = self.store.chunks(self.split, blocks)
        rows, window = table.total, self._window_rows()
        lanes = math.gcd(self.settings.lanes, self.batch_size)
        share = max(1, window // (lanes * self.store.description.geometry.chunk_rows))
        whole = rows <= window
        if (self.batch_size if whole else lanes) % self._ranks:
            raise ConfigError(
                f"{self._ranks} ranks cannot share out a batch of {self.batch_size} rows",
                expected=f"a number of ranks that divides {self.batch_size if whole else lanes}",
                do="choose batch_size and lanes as multiples of the number of ranks",
            )
        self._frozen = {
            g.folder.name: [n, g.digest(n)] for g in self.store.groups if (n := blocks.get(g.number, 0))
        }
        balance = None
        if self.settings.entity_rows:
            balance = EntityBalance(
                self.store, self.split, blocks, entity_rows=self.settings.entity_rows, seed=self.seed
            )
        self._slice_rows = self._choose_slices(rows)
        self._order = Order(
            balance.chunk_rows if balance else table.rows,
            batch_size=self.batch_size,
            lanes=lanes,
            window_chunks=0 if whole else share,
            seed=self.seed,
            slice_rows=max(1, self._slice_rows),
        )
        names = (*self.hooks, *(COLUMNS if self._coordinates else ()))
        self._selection = Selection(self.store, self.split, names, table, self.run_length, balance)

    def _begin(self) -> Gathering | Ring:
        """Start to read, at any batch."""
        order, selection, lanes = self._order, self._selection, self._order.lanes_of(self._rank, self._ranks)
        # what is made ahead, and what callers hold
        kept = 8
        if self._slice_rows:
            window = order.window_chunks * self.store.description.geometry.chunk_rows
            kept += 2 * window * order.lanes // self.batch_size
        memory = BatchMemory(selection.specs, self.batch_size // self._ranks, self._device, kept=kept)
        if self._slice_rows:
            return Ring(selection, order, self._pool, lanes, memory)
        windows = Windows(selection, order, self._pool, lanes)
        return Gathering(windows, order, memory, self._rank, self._ranks)

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _check(store: ActivationStore, hooks: tuple[str, ...], split: str, run_length: int) -> None:
    for hook in hooks:
        store.moments(hook, split)
    if not hooks or not store.splits.get(split):
        raise StoreError(f"{store.path} has no rows of split {split!r} to serve")
    if run_length > store.description.run_length:
        raise StoreError(
            f"{store.path} does not keep runs of {run_length} rows together",
            got=f"written with run_length {store.description.run_length}",
            do="harvest with a longer run_length",
        )


def _form(slice_rows: int) -> dict[str, Any]:
    """Return what tells orders apart that follow from the same settings; slices of one row change nothing."""
    return {"format_version": 2, "slice_rows": slice_rows} if slice_rows > 1 else {"format_version": 1}


def _refuse_others(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    differ = [name for name in mine if state.get(name) != mine[name]]
    if differ:
        raise CheckpointError(
            "the saved position in the data belongs to another order",
            got="; ".join(f"{name} {mine[name]}" for name in differ),
            expected="; ".join(f"{name} {state.get(name)}" for name in differ),
            do="give these settings their former values, or start the training again",
        )
