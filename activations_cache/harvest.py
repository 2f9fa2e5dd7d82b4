"""Harvesting: from a source of activations into a store, resumable, with its cost said first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field

from sae.config import Config
from sae.errors import StoreError
from sae.world import World

from .begin import CompleteError, check_same, describe
from .commits import read_groups
from .parts import end_part, fix_parts, open_parts, world_of
from .places import Location, LockedError, Place, place_of
from .schema import Description, StoreLayout
from .seal import seal
from .splits import SPLITS
from .store import ActivationStore
from .writer import StoreWriter

if TYPE_CHECKING:
    # sources bring the libraries of their models
    from .sources.base import ActivationBatch, ActivationSource


class HarvestConfig(Config):
    """What is read off the model and how it is stored."""

    store: str = ""
    """Where the stores lie if not in the run folder: another folder, or a prefix such as s3://bucket/runs/uci
    (needs `assay[s3]`; AWS_* environment variables say who and where). The store is `activations.zarr` below it."""
    hooks: tuple[str, ...] = Field(default=("layers.2",), min_length=1)
    """Places in the model: NAME, NAME:in, NAME[0], NAME@1; globs allowed. Ignored where the source has its
    own."""
    layout: StoreLayout = StoreLayout()
    """Number format, block and file sizes."""
    parts: int = Field(default=0, ge=0)
    """Parts that the entities are divided into, by hash; a process harvests one at a time. 0 = as many as
    there are processes at the start; more let more processes continue later."""
    run_length: int = Field(default=1, ge=1)
    """Consecutive rows of an entity that stay together when rows are shuffled; sae.kind=temporal needs 2 or more."""


class HarvestProgress(NamedTuple):
    """What the caller is told."""

    rows: int
    total: int
    text: str


Report = Callable[[HarvestProgress], None]


class Estimate(NamedTuple):
    """What a harvest will cost."""

    rows: int
    bytes: int
    left: int
    """Rows that are not committed yet."""
    free: int | None
    """Bytes free where the store will lie; None if there is no bound."""


def estimate(source: ActivationSource, layout: StoreLayout, path: Location) -> Estimate:
    """Return rows and bytes of a harvest, and the space there is.

    Raises
    ------
    StoreError
        The disk cannot hold it.
    """
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[layout.dtype]
    per_row = 3 * 8 + width * sum(source.hooks.values())
    place = place_of(path)
    needed, free = int(source.n_rows * per_row * 1.05), place.free()
    there = sum(commit.rows for group in read_groups(place) for commit in group.commits)
    left = needed - int(there * per_row)
    if free is not None and left > free:
        raise StoreError(
            f"the store would not fit where {path} lies",
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{left / 1e9:.1f} GB for {source.n_rows - there:,} rows",
            do="free space, harvest fewer hooks, or set harvest.layout.dtype=float16",
        )
    return Estimate(source.n_rows, needed, source.n_rows - there, free)


def probe(source: ActivationSource, world: World, *, seconds: float = 1.0) -> float:
    """Return the seconds that reading all of a source will take, from its first batches; nothing is kept.

    The first batch is read twice and counted once, as it is slow for reasons of its own. Writing goes on beside
    the model, so where the disk keeps up this is how long the harvest takes.
    """
    first = next(source.batches(world), None)
    if first is None:
        return 0.0
    rows, since, spent = 0, time.monotonic(), 0.0
    for batch in source.batches(world):
        rows += len(batch.entity)
        spent = time.monotonic() - since
        if spent > seconds:
            break
    return spent * source.n_rows / max(rows, 1) / world.size


def harvest(
    source: ActivationSource,
    path: Location,
    config: HarvestConfig,
    *,
    seed: int,
    world: World,
    report: Report = lambda _: None,
) -> ActivationStore:
    """Write all of a source's rows into a store and seal it; a second call continues where the first stopped.

    Every process of `world` calls it and none waits for another to write: each takes the part that its rank
    begins with, then any that is left, one that a dead process held included. Then it waits until the parts
    that others hold have ended; whoever is first to see that seals. So it returns a complete store.

    Parameters
    ----------
    seed
        Of the shuffling within blocks.
    report
        Told about this process's rows done, its share of all rows, and where the time goes.

    Raises
    ------
    StoreError
        Too little space, a number that the format cannot hold, other settings than the store was begun with,
        or damage.
    """
    store = place_of(path)
    wanted = describe(
        source.hooks,
        config.layout,
        seed=seed,
        provenance=source.provenance,
        run_length=config.run_length,
    )
    parts = fix_parts(store, wanted=config.parts, processes=world.size)
    meter = _Meter(estimate(source, config.layout, store), parts, report)

    def take(part: int) -> bool:
        try:
            writer = StoreWriter(
                store,
                hooks=source.hooks,
                layout=config.layout,
                seed=seed,
                provenance=source.provenance,
                run_length=config.run_length,
                writer=part,
            )
        except (LockedError, CompleteError):
            return False
        with writer:
            _copy(source.batches(world_of(part, parts, world), writer.cursor or 0), writer, meter)
        end_part(store, part)
        return True

    while not _complete(store, wanted):
        left = open_parts(store, parts, world)
        if left and any(take(part) for part in left):
            continue
        # a part may be held for a moment by somebody who finds that it has ended
        with suppress(LockedError):
            if not left:
                seal(store, entities=source.entities)
                continue
        meter.waits(left)
        time.sleep(store.poll_seconds)
    return ActivationStore.open(store)


def _complete(store: Place, wanted: Description) -> bool:
    if (store / "zarr.json").size() is None:
        return False
    found = Description.read(store)
    check_same(store, found, wanted)
    return bool(found.sealed)


def _copy(batches: Iterator[ActivationBatch], writer: StoreWriter, meter: _Meter) -> None:
    """Append all batches to a writer."""
    meter.begins(writer.rows)
    while True:
        with meter.timed("model"):
            batch = next(batches, None)
        if batch is None:
            return
        with meter.copying(writer):
            writer.append(
                batch.acts,
                entity=batch.entity,
                position=batch.position,
                time=batch.time,
                split=np.asarray(SPLITS)[batch.split],
                cursor=batch.cursor,
            )
        meter.adds(len(batch.entity))


class _Meter:
    """Tells how far this process is, and where its time goes."""

    def __init__(self, cost: Estimate, parts: int, report: Report) -> None:
        self._cost, self._parts, self._report = cost, parts, report
        self._spent = {"model": 0.0, "copy": 0.0, "write": 0.0}
        self._begun = self._done = self._new = 0
        self._since = time.monotonic()

    def begins(self, rows: int) -> None:
        """Count in a part, and the rows of it that are there already."""
        self._begun += 1
        self._done += rows

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time that the block takes."""
        at = time.monotonic()
        yield
        self._spent[what] += time.monotonic() - at

    @contextmanager
    def copying(self, writer: StoreWriter) -> Iterator[None]:
        """Count the time that the block takes; what of it the writer waits for the disk is its writing."""
        at, waited = time.monotonic(), writer.wait_seconds
        yield
        waited = writer.wait_seconds - waited
        self._spent["write"] += waited
        self._spent["copy"] += time.monotonic() - at - waited

    def adds(self, rows: int) -> None:
        """Count rows and tell."""
        self._done += rows
        self._new += rows
        elapsed = max(time.monotonic() - self._since, 1e-9)
        rate = self._new / elapsed
        megabytes = rate * self._cost.bytes / max(self._cost.rows, 1) / 1e6
        shares = ", ".join(f"{what} {seconds / elapsed:.0%}" for what, seconds in self._spent.items())
        self._tell(f"{rate:,.0f} rows/s, {megabytes:.0f} MB/s, {shares}")

    def waits(self, parts: Sequence[int]) -> None:
        """Tell that others are still at work."""
        self._tell("waits for other processes" + (f": part {', '.join(map(str, parts))}" if parts else ""))

    def _tell(self, text: str) -> None:
        total = round(self._cost.rows * self._begun / self._parts)
        self._report(HarvestProgress(self._done, max(self._done, total), text))
