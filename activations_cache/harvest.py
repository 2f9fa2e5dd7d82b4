"""Harvesting: from a source of activations into a store, resumable, with its cost said first."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from sae.config import Config
from sae.errors import StoreError
from sae.world import World

from .schema import StoreLayout
from .seal import seal
from .sources.base import ActivationSource
from .splits import SPLITS
from .store import ActivationStore
from .writer import StoreWriter


class HarvestConfig(Config):
    """What is read off the model and how it is stored."""

    hooks: tuple[str, ...] = Field(default=("layers.2",), min_length=1)
    """Places in the model: NAME, NAME:in, NAME[0], NAME@1; globs allowed. Ignored where the source has its own."""
    layout: StoreLayout = StoreLayout()
    """Number format, block and file sizes."""


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
    free: int
    """Bytes free where the store will lie."""


def estimate(source: ActivationSource, layout: StoreLayout, path: Path) -> Estimate:
    """Return rows and bytes of a harvest, and the space there is.

    Raises
    ------
    StoreError
        The disk cannot hold it.
    """
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[layout.dtype]
    per_row = 3 * 8 + width * sum(source.hooks.values())
    parent = next(p for p in (path, *path.parents) if p.exists())
    needed, free = int(source.n_rows * per_row * 1.05), shutil.disk_usage(parent).free
    if needed > free:
        raise StoreError(
            f"the store would not fit where {path} lies",
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB for {source.n_rows:,} rows",
            do="free space, harvest fewer hooks, or set harvest.layout.dtype=float16",
        )
    return Estimate(source.n_rows, needed, free)


def harvest(
    source: ActivationSource,
    path: Path,
    config: HarvestConfig,
    *,
    seed: int,
    world: World,
    report: Report = lambda _: None,
) -> ActivationStore:
    """Write all of a source's rows into a store and seal it; a second call continues where the first stopped.

    Parameters
    ----------
    seed
        Of the shuffling within blocks.
    report
        Told about rows done, rows in all, and where the time goes.

    Raises
    ------
    StoreError
        Too little space, a number that the format cannot hold, another writer at work, or damage.
    """
    cost = estimate(source, config.layout, path)
    spent = {"model": 0.0, "write": 0.0}
    with StoreWriter(
        path, hooks=source.hooks, layout=config.layout, seed=seed, provenance=source.provenance, writer=world.rank
    ) as writer:
        done = writer.rows
        began, first = time.monotonic(), done
        batches = source.batches(world, writer.cursor or 0)
        while True:
            at = time.monotonic()
            batch = next(batches, None)
            spent["model"] += time.monotonic() - at
            if batch is None:
                break
            at = time.monotonic()
            writer.append(
                batch.acts,
                entity=batch.entity,
                position=batch.position,
                time=batch.time,
                split=np.asarray(SPLITS)[batch.split],
                cursor=batch.cursor,
            )
            spent["write"] += time.monotonic() - at
            done += len(batch.entity)
            elapsed = max(time.monotonic() - began, 1e-9)
            rate = (done - first) / elapsed
            text = f"{rate:,.0f} rows/s, {rate * cost.bytes / max(cost.rows, 1) / 1e6:.0f} MB/s, model {spent['model'] / elapsed:.0%}"
            report(HarvestProgress(done, cost.rows, text))
    seal(path, entities=source.entities)
    return ActivationStore.open(path)


def weights_hash(folder: Path) -> str:
    """Return a hash over a model folder's weight files, for provenance."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
