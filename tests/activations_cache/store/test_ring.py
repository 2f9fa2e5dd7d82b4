"""Slices read straight into batches: the order against plain Python, and faults on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations_cache.loader import LoadedBatch, LoaderConfig, ShuffledLoader
from activations_cache.places.local import LocalPlace
from activations_cache.ring import Ring
from activations_cache.schema import StoreLayout
from activations_cache.shards import ArrayReader
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.errors import CheckpointError, StoreError
from sae.world import World

from .conftest import make_rows, store_rows

HOOKS = ("layers.2", "layers.2:in")


def rank(r: int, n: int) -> World:
    return World(rank=r, size=n, device=torch.device("cpu"), axes={"data": n, "feature": 1})


def load(store, *, window_rows=200, world=None, batch_size=64, lanes=8, hooks=HOOKS, **more):
    config = LoaderConfig(window_rows=window_rows, lanes=lanes, **more)
    return ShuffledLoader(
        store, hooks, "fit", batch_size=batch_size, seed=3, world=world or rank(0, 1),
        coordinates=True, settings=config,
    )  # fmt: skip


@pytest.fixture(scope="module")
def singly(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows shuffled one by one, of three writers."""
    return store_rows(tmp_path_factory.mktemp("singly") / "a.zarr", make_rows(300), writers=3)


def permuted(n: int, *where: int) -> list[int]:
    bits = np.random.Philox(np.random.SeedSequence([3, *where]))
    return np.random.Generator(bits).permutation(n).tolist()


def lane_rows(chunks: list[list[int]], epoch: int, lane: int, *, lanes: int, window: int, cut: int):
    """What a lane serves in an epoch, row by row."""
    laid = [(c, row) for c in permuted(len(chunks), epoch) for row in chunks[c]]
    n = len(laid)
    belongs = [sum(g % lanes == v for g in range(epoch * n, (epoch + 1) * n)) for v in range(lanes)]
    mine = laid[sum(belongs[:lane]) : sum(belongs[: lane + 1])]
    seen = list(dict.fromkeys(c for c, _ in mine))
    for number in range(0, len(seen), window):
        slices = []
        for c in seen[number : number + window]:
            rows = [row for of, row in mine if of == c]
            slices += [rows[i : i + cut] for i in range(0, len(rows), cut)]
        for i in permuted(len(slices), epoch, lane, number // window):
            yield from slices[i]


def batches_of(chunks: list[list[int]], size: int, n: int, *, lanes: int, window: int, cut: int):
    """The first n batches, as rows of the store."""

    def endless(lane: int) -> Iterator[int]:
        for epoch in range(10**6):
            yield from lane_rows(chunks, epoch, lane, lanes=lanes, window=window, cut=cut)

    streams = [endless(lane) for lane in range(lanes)]
    return [[next(s) for s in streams for _ in range(size // lanes)] for _ in range(n)]


def stored_rows(store: ActivationStore):
    """All rows in storage order, and the numbers of those of each chunk."""
    (rows,) = store.rows_of(list(HOOKS), "fit")
    ends = np.cumsum(store.chunks("fit").rows).tolist()
    return rows, [list(range(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def check(batch: LoadedBatch, rows, want: list[int]) -> None:
    for name in ("entity", "position", "time"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(rows, name)[want])
    for hook, acts in batch.acts.items():
        np.testing.assert_array_equal(acts.float().numpy(), rows.acts[hook][want])


@settings(deadline=None, max_examples=30)
@given(
    entities=st.integers(4, 60),
    writers=st.integers(1, 3),
    chunk_rows=st.sampled_from([2, 3, 8]),
    lanes=st.sampled_from([1, 2, 4, 8]),
    share=st.integers(1, 9),
    window_rows=st.integers(1, 80),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_batches_are_those_of_the_order_in_plain_python(
    tmp_path_factory, entities, writers, chunk_rows, lanes, share, window_rows, dtype
):
    layout = StoreLayout(chunk_rows=chunk_rows, shard_rows=chunk_rows * 4, block_rows=37, dtype=dtype)
    path = tmp_path_factory.mktemp("order") / "a.zarr"
    store = store_rows(path, make_rows(entities), layout=layout, writers=writers)
    rows, chunks = stored_rows(store)
    total, size = len(rows.entity), lanes * share
    if total <= window_rows:
        return
    loader = load(store, window_rows=window_rows, lanes=lanes, batch_size=size)
    # rows of the hooks have 42 bytes or half of it on average, so the lane's share bounds a slice
    cut = 1 << share.bit_length() - 1
    n = 2 * total // size + 2
    window = max(1, window_rows // (lanes * chunk_rows))
    want = batches_of(chunks, size, n, lanes=lanes, window=window, cut=cut)
    assert loader.state_dict()["format_version"] == (2 if cut > 1 else 1)
    for batch, numbers in zip(loader.batches(n), want, strict=True):
        check(batch, rows, numbers)
    assert isinstance(loader._batches, Ring)
    loader.close()
    served = Counter(i for numbers in want for i in numbers)
    assert set(served) == set(range(total))
    if lanes == 1:
        assert Counter([i for numbers in want for i in numbers][: 2 * total]) == Counter(
            dict.fromkeys(range(total), 2)
        )


def test_wide_rows_are_served_singly_and_narrow_ones_in_slices(tmp_path):
    rows = make_rows(40, hooks={"wide": 4096, "narrow": 256})
    store = store_rows(tmp_path / "a", rows)

    def state(hooks):
        return load(store, hooks=hooks, window_rows=50, batch_size=256).state_dict()

    # 16384, 1024 and on average 8704 bytes
    assert state("wide")["format_version"] == state(("wide", "narrow"))["format_version"] == 1
    assert (state("narrow")["format_version"], state("narrow")["slice_rows"]) == (2, 8)


def test_rows_are_gathered_singly_where_neighbours_are_not_random(singly, stored, tmp_path):
    unshuffled = store_rows(tmp_path / "a", make_rows(60), layout=StoreLayout(chunk_rows=32, shuffle=False))
    for loader in (
        load(stored),
        load(unshuffled),
        load(singly, window_rows=10**6),
        load(singly, entity_rows=3),
    ):
        assert loader.state_dict()["format_version"] == 1
        loader.next_batch()
        assert not isinstance(loader._batches, Ring)


@pytest.mark.parametrize("window_rows", [1, 200, 800])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batches_of_one_process(singly, window_rows, ranks):
    one = list(load(singly, window_rows=window_rows).batches(90))
    parts = [load(singly, window_rows=window_rows, world=rank(r, ranks)).batches(90) for r in range(ranks)]
    for whole, *mine in zip(one, *parts, strict=True):
        for hook in HOOKS:
            assert torch.equal(torch.cat([p.acts[hook] for p in mine]), whole.acts[hook])
        assert torch.equal(torch.cat([p.entity for p in mine]), whole.entity)


@pytest.mark.parametrize("taken", [1, 37, 60])
def test_it_resumes_with_the_same_bits_on_other_ranks(singly, taken):
    first = load(singly, window_rows=800)
    list(first.batches(taken))
    state = first.state_dict()
    want = list(first.batches(50))
    assert want[-1].entity is not None and first.epoch >= 1
    for ranks in (1, 2):
        again = [load(singly, window_rows=800, world=rank(r, ranks)) for r in range(ranks)]
        for loader in again:
            list(loader.batches(5))
            loader.load_state_dict(state)
        for whole, *mine in zip(want, *(loader.batches(50) for loader in again), strict=True):
            assert torch.equal(torch.cat([p.acts["layers.2"] for p in mine]), whole.acts["layers.2"])
            assert torch.equal(torch.cat([p.position for p in mine]), whole.position)


def test_states_of_rows_served_singly_are_refused(singly):
    loader = load(singly)
    state = {**loader.state_dict(), "format_version": 1}
    del state["slice_rows"]
    with pytest.raises(CheckpointError, match="slice_rows"):
        loader.load_state_dict(state)
    with pytest.raises(CheckpointError, match="slice_rows"):
        loader.load_state_dict({**loader.state_dict(), "slice_rows": 2})


def test_a_store_that_outgrows_the_window_keeps_the_order_of_a_state(tmp_path, rows, layout, feed):
    path, hooks = tmp_path / "a.zarr", {h: a.shape[1] for h, a in rows.acts.items()}
    for stop in (1500, len(rows.entity)):
        with StoreWriter(path, hooks=hooks, layout=layout, seed=0, provenance={}) as writer:
            feed(writer, rows.part(0, stop), start=writer.cursor[0] if writer.cursor else 0)
        if stop == 1500:
            first = load(ActivationStore.open(path, allow_incomplete=True), window_rows=900)
            state, want = first.state_dict(), list(first.batches(30))
    later = load(ActivationStore.open(path, allow_incomplete=True), window_rows=900)
    assert (state["format_version"], later.state_dict()["format_version"]) == (1, 2)
    later.load_state_dict(state)
    assert later.state_dict() == state
    for a, b in zip(want, later.batches(30), strict=True):
        assert torch.equal(a.acts["layers.2"], b.acts["layers.2"])


def test_batches_that_are_kept_do_not_change(singly):
    kept = list(load(singly).batches(90))
    again = load(singly)
    for a in kept:
        b = again.next_batch()
        assert torch.equal(a.acts["layers.2"], b.acts["layers.2"]) and torch.equal(a.time, b.time)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes(bytes(data))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("harm", "message"),
    [(damage, "is damaged"), (shorten, "is too short"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("read_before", [False, True])
def test_what_cannot_be_read_is_named_and_served_once_it_is_back(
    tmp_path, rows, write, harm, message, read_before
):
    want = list(load(write(tmp_path / "a.zarr", rows)).batches(60))
    path = tmp_path / "a.zarr/w0000/fit/acts/layers.2/c.1.0"
    whole = path.read_bytes()
    loader = load(ActivationStore.open(tmp_path / "a.zarr"))
    if read_before:
        state = loader.state_dict()
        list(loader)
        loader.load_state_dict(state)
    harm(path)
    if read_before and harm is damage:
        # checksums are compared when a chunk is first read
        assert len(list(loader)) == loader.batches_per_epoch
        return
    served = []
    with pytest.raises(StoreError, match=rf"c\.1\.0 {message}"):
        served += iter(loader.next_batch, None)
    with pytest.raises(StoreError, match=rf"c\.1\.0 {message}"):
        loader.next_batch()
    path.write_bytes(whole)
    served += loader.batches(len(want) - loader.batch)
    assert len(served) == len(want)
    for a, b in zip(served, want, strict=True):
        assert torch.equal(a.acts["layers.2"], b.acts["layers.2"]) and torch.equal(a.entity, b.entity)


def test_the_disk_is_told_of_what_is_read_whole_for_its_checksum(singly, monkeypatch):
    told, read = [], []
    expect, scatter = LocalPlace.expect, ArrayReader.scatter

    def note(self, offset, size):
        if str(self).startswith(str(singly.path)):
            told.append((str(self), offset))
        expect(self, offset, size)

    def fill(self, chunk, start, pieces):
        path, offset = self.locate(chunk)
        read.append((str(path), offset))
        scatter(self, chunk, start, pieces)

    monkeypatch.setattr("activations_cache.ring._TASK_BYTES", 1)
    monkeypatch.setattr(LocalPlace, "expect", note)
    monkeypatch.setattr(ArrayReader, "scatter", fill)
    loader = load(ActivationStore.open(singly.path), window_rows=800)
    counts = []
    for _ in range(3):
        assert sum(len(batch.entity) for batch in loader)
        counts.append(len(told))
    loader.close()
    # what earlier tests left to be garbage may still be reading
    assert set(told) == {(path, offset) for path, offset in read if path.startswith(str(singly.path))}
    assert counts[1] == counts[2]
