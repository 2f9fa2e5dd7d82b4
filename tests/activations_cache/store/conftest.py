"""Rows whose every value can be told from who and when, and a way to store them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from tests.activations_cache.store.s3_server import new_bucket, running_server


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the source."""

    acts: dict[str, np.ndarray]
    entity: np.ndarray
    position: np.ndarray
    time: np.ndarray
    split: np.ndarray

    def part(self, start: int, stop: int) -> Rows:
        s = slice(start, stop)
        acts = {h: a[s] for h, a in self.acts.items()}
        return Rows(acts, self.entity[s], self.position[s], self.time[s], self.split[s])

    def where(self, mask: np.ndarray) -> Rows:
        """The chosen rows, sorted by (entity, position)."""
        order = np.flatnonzero(mask)[np.lexsort((self.position[mask], self.entity[mask]))]
        acts = {h: a[order] for h, a in self.acts.items()}
        return Rows(acts, self.entity[order], self.position[order], self.time[order], self.split[order])


def make_rows(n_entities: int, *, seed: int = 0, hooks: dict[str, int] | None = None) -> Rows:
    rng = np.random.default_rng(seed)
    entity = np.repeat(np.arange(n_entities), rng.integers(1, 20, n_entities))
    position = np.concatenate([np.arange(c) for c in np.bincount(entity)])
    names = np.array(["fit", "fit", "fit", "discover", "confirm"])
    acts = {
        h: rng.standard_t(4, size=(len(entity), d)).astype(np.float32) for h, d in (hooks or HOOKS).items()
    }
    return Rows(acts, entity, position, position * 2 + 100, names[entity % 5])


HOOKS = {"layers.2": 16, "layers.2:in": 5}
LAYOUT = StoreLayout(chunk_rows=32, shard_rows=128, block_rows=700)

Write = Callable[..., ActivationStore]


def append(writer: StoreWriter, rows: Rows, *, step: int = 100, start: int = 0) -> None:
    for i in range(start, len(rows.entity), step):
        p = rows.part(i, i + step)
        writer.append(
            p.acts,
            entity=p.entity,
            position=p.position,
            time=p.time,
            split=p.split,
            cursor=[i + len(p.entity)],
        )


def store_rows(
    path: Path,
    rows: Rows,
    *,
    layout: StoreLayout = LAYOUT,
    writers: int = 1,
    run_length: int = 1,
    seed: int = 5,
) -> ActivationStore:
    hooks = {h: a.shape[1] for h, a in rows.acts.items()}
    for w in range(writers):
        mine = rows.entity % writers == w
        part = Rows(
            {h: a[mine] for h, a in rows.acts.items()},
            *(getattr(rows, c)[mine] for c in ("entity", "position", "time", "split")),
        )
        with StoreWriter(
            path,
            hooks=hooks,
            layout=layout,
            seed=seed,
            provenance={"model": "m"},
            writer=w,
            run_length=run_length,
        ) as writer:
            append(writer, part)
    seal(path)
    return ActivationStore.open(path)


@pytest.fixture(scope="session")
def rows() -> Rows:
    """About 3000 rows of 300 entities, two hooks."""
    return make_rows(300)


@pytest.fixture
def write() -> Write:
    """Store rows with some writers, seal and open."""
    return store_rows


@pytest.fixture
def feed() -> Callable[..., None]:
    """Append rows in steps; the cursor is a list with the number of rows."""
    return append


@pytest.fixture
def new_rows() -> Callable[..., Rows]:
    """Make rows of so many entities."""
    return make_rows


@pytest.fixture
def layout() -> StoreLayout:
    """Small chunks, shards and blocks."""
    return LAYOUT


@pytest.fixture(scope="session")
def stored(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The rows, stored by three writers in runs of three; nobody changes it."""
    return store_rows(tmp_path_factory.mktemp("stored") / "a.zarr", rows, writers=3, run_length=3)


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """A real S3 server on loopback; the AWS_* variables lead to it."""
    with running_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def bucket(s3: dict[str, str]) -> str:
    """URL of a new bucket."""
    return new_bucket()


@pytest.fixture(scope="session")
def few() -> Rows:
    """About 600 rows: an object store on loopback answers a hundred requests in a second."""
    return make_rows(60)


@pytest.fixture(scope="session")
def blocks() -> StoreLayout:
    """Blocks of which those rows make three."""
    return StoreLayout(chunk_rows=32, shard_rows=128, block_rows=250)
