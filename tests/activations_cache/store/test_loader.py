"""Batches: every row once an epoch, the same for any number of ranks, the same again after a resumption."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations_cache.batches import Recycler
from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.order import Order
from activations_cache.schema import StoreLayout
from activations_cache.store import ActivationStore
from activations_cache.windows import Gathering
from activations_cache.writer import StoreWriter
from sae.errors import CheckpointError, ConfigError, StoreError
from sae.world import World

CPU = torch.device("cpu")


def rank(r: int, n: int) -> World:
    return World(rank=r, size=n, device=CPU, axes={"data": n, "feature": 1})


def load(
    store, *, window_rows=200, world=None, hooks="layers.2", split="fit", batch_size=64, run_length=1, seed=3
):
    config = LoaderConfig(window_rows=window_rows, lanes=8)
    return ShuffledLoader(
        store, hooks, split, batch_size=batch_size, seed=seed, world=world or rank(0, 1),
        run_length=run_length, coordinates=True, settings=config,
    )  # fmt: skip


def keys(batches) -> list[tuple[int, int]]:
    return [k for b in batches for k in zip(b.entity.tolist(), b.position.tolist(), strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    chunk_rows=st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any).map(np.array),
    share=st.integers(1, 6),
    lanes=st.sampled_from([1, 2, 4, 8]),
    window_chunks=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_the_order_serves_every_row_once_an_epoch(chunk_rows, share, lanes, window_chunks, seed):
    n, size = int(chunk_rows.sum()), share * 8
    order = Order(chunk_rows, batch_size=size, lanes=lanes, window_chunks=window_chunks, seed=seed)
    served: Counter[tuple[int, int, int]] = Counter()
    for batch in range(2 * n // size + 1):
        takes = order.takes(batch, 0, 1)
        assert sum(t.stop - t.start for t in takes) == size
        for ranks in (2, 4):
            if order.whole or lanes % ranks == 0:
                parts = [order.takes(batch, r, ranks) for r in range(ranks)]
                assert all(sum(t.stop - t.start for t in p) == size // ranks for p in parts)
                flat = [(t.epoch, t.lane, i) for p in parts for t in p for i in range(t.start, t.stop)]
                if order.whole:
                    assert sorted(flat) == [
                        (t.epoch, t.lane, i) for t in takes for i in range(t.start, t.stop)
                    ]
                else:
                    assert [t for p in parts for t in p] == takes
        for t in takes:
            for i in range(t.start, t.stop):
                w = order.window(t.epoch, t.lane, i)
                rows = [(chunk, k) for chunk, start, m in w.pieces for k in range(start, start + m)]
                served[(t.epoch, *rows[i - w.first])] += 1
    every = {(c, k) for c, m in enumerate(chunk_rows.tolist()) for k in range(m)}
    for epoch in (0, 1):
        assert {(c, k) for e, c, k in served if e == epoch} == every
    assert set(served.values()) == {1}


@pytest.mark.parametrize("window_rows", [1, 200, 10**6])
def test_rows_are_those_of_the_store_once_an_epoch(stored, rows, window_rows):
    loader = load(stored, window_rows=window_rows, hooks=["layers.2", "layers.2:in"])
    n = loader.rows_per_epoch
    batches = list(loader.batches(3 * n // 64 + 1))
    counts = Counter(keys(batches))
    assert len(counts) == n == stored.splits["fit"]
    assert (
        set(counts.values()) <= {3, 4} and sum(v == 4 for v in counts.values()) == len(batches) * 64 - 3 * n
    )
    known = {k: i for i, k in enumerate(zip(rows.entity.tolist(), rows.position.tolist(), strict=True))}
    for b in batches[:10]:
        at = [known[k] for k in keys([b])]
        for hook in loader.hooks:
            np.testing.assert_array_equal(b.acts[hook].numpy(), rows.acts[hook][at])
        np.testing.assert_array_equal(b.time.numpy(), rows.time[at])
    assert loader.wait_seconds > 0


@pytest.mark.parametrize("window_rows", [200, 10**6])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batches_of_one_process(stored, window_rows, ranks):
    one = list(load(stored, window_rows=window_rows).batches(60))
    parts = [load(stored, window_rows=window_rows, world=rank(r, ranks)).batches(60) for r in range(ranks)]
    for whole, *mine in zip(one, *parts, strict=True):
        assert torch.equal(torch.cat([p.x for p in mine]), whole.x)
        assert torch.equal(torch.cat([p.entity for p in mine]), whole.entity)


def test_ranks_of_the_feature_axis_get_the_same_rows(stored):
    worlds = [World(rank=r, size=4, device=CPU, axes={"data": 2, "feature": 2}) for r in range(4)]
    a, b, c, d = (next(load(stored, world=w).batches(1)).x for w in worlds)
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)


@pytest.mark.parametrize("window_rows", [200, 10**6])
def test_it_resumes_with_the_same_bits_on_other_ranks(stored, window_rows):
    first = load(stored, window_rows=window_rows)
    list(first.batches(37))
    state = first.state_dict()
    want = list(first.batches(40))
    for ranks in (1, 2):
        again = [load(stored, window_rows=window_rows, world=rank(r, ranks)) for r in range(ranks)]
        for loader in again:
            list(loader.batches(5))
            loader.load_state_dict(state)
        for whole, *mine in zip(want, *(loader.batches(40) for loader in again), strict=True):
            assert torch.equal(torch.cat([p.x for p in mine]), whole.x)


def test_one_iteration_is_the_rest_of_an_epoch(stored):
    loader = load(stored)
    assert len(list(loader)) == loader.batches_per_epoch and loader.epoch == 1
    list(loader.batches(3))
    assert len(list(loader)) < loader.batches_per_epoch - 2 and loader.epoch == 2


def test_epochs_and_seeds_differ(stored):
    a, b = load(stored), load(stored, seed=4)
    first = keys(a.batches(10))
    list(a)
    assert len(set(first) & set(keys(a.batches(10)))) < 500
    assert first != keys(b.batches(10))


def test_a_state_of_something_else_is_refused(stored, rows, write, tmp_path):
    state = load(stored).state_dict()
    with pytest.raises(CheckpointError, match="seed"):
        load(stored, seed=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="no longer holds"):
        load(write(tmp_path / "b.zarr", rows, writers=3, run_length=3, seed=9)).load_state_dict(state)


def test_a_growing_store_does_not_change_the_order(tmp_path, rows, layout, feed):
    path = tmp_path / "a.zarr"
    hooks = {"layers.2": 16, "layers.2:in": 5}
    with StoreWriter(path, hooks=hooks, layout=layout, seed=0, provenance={}) as writer:
        feed(writer, rows.part(0, 1500))
    loader = load(ActivationStore.open(path, allow_incomplete=True))
    list(loader.batches(5))
    state = loader.state_dict()
    want = list(loader.batches(30))
    with StoreWriter(path, hooks=hooks, layout=layout, seed=0, provenance={}) as writer:
        feed(writer, rows, start=1500)
    later = load(ActivationStore.open(path, allow_incomplete=True))
    assert later.rows_per_epoch > loader.rows_per_epoch
    later.load_state_dict(state)
    assert all(torch.equal(a.x, b.x) for a, b in zip(want, later.batches(30), strict=True))


def test_runs_are_served_together(stored):
    loader = load(stored, run_length=3, window_rows=10**6, batch_size=256)
    together = 0
    for b in loader.batches(4):
        together += int(((b.entity[1:] == b.entity[:-1]) & (b.position[1:] == b.position[:-1] + 1)).sum())
    assert together > 0.5 * 4 * 256
    with pytest.raises(StoreError, match="runs of 4"):
        load(stored, run_length=4)


@pytest.mark.parametrize("window_rows", [200, 10**6])
def test_entities_are_served_in_equal_measure(stored, rows, window_rows):
    def load_balanced(**more):
        config = LoaderConfig(window_rows=window_rows, lanes=8, entity_rows=4)
        return ShuffledLoader(
            stored, "layers.2", "fit", batch_size=64, seed=3, coordinates=True, settings=config, **more
        )

    loader = load_balanced(world=rank(0, 1))
    lengths = np.bincount(rows.entity[rows.split == "fit"])
    n = int(np.minimum(lengths, 4).sum())
    assert loader.rows_per_epoch == n
    # so many that they end with a batch
    epochs = 2 * 64 // math.gcd(n, 64)
    batches = list(loader.batches(epochs * n // 64 + 1))
    served = keys(batches[:-1])
    counts = np.bincount([entity for entity, _ in served], minlength=len(lengths))
    np.testing.assert_array_equal(counts, epochs * np.minimum(lengths, 4))
    if window_rows > n:
        for e in range(epochs):
            assert len(set(served[e * n : (e + 1) * n])) == n
    times = Counter(served)
    assert max(times.values()) <= epochs
    long = int(np.argmax(lengths))
    chances = np.array([times[long, position] for position in range(lengths[long])])
    assert chances.sum() == epochs * 4 and chances.min() >= 1
    known = {k: i for i, k in enumerate(zip(rows.entity.tolist(), rows.position.tolist(), strict=True))}
    for b in batches[:20]:
        np.testing.assert_array_equal(b.x.numpy(), rows.acts["layers.2"][[known[k] for k in keys([b])]])
    again = [load_balanced(world=rank(r, 2)) for r in range(2)]
    for whole, *mine in zip(batches[:30], *(a.batches(30) for a in again), strict=True):
        assert torch.equal(torch.cat([p.x for p in mine]), whole.x)
    state = again[0].state_dict()
    later = load_balanced(world=rank(0, 1))
    later.load_state_dict(state)
    assert torch.equal(next(later.batches(1)).x, batches[30].x)
    with pytest.raises(ConfigError, match="entity_rows"):
        load_balanced(world=rank(0, 1), run_length=2)


def test_a_growing_store_keeps_the_balance(tmp_path, rows, layout, feed):
    path, hooks = tmp_path / "a.zarr", {"layers.2": 16, "layers.2:in": 5}
    settings = LoaderConfig(window_rows=200, lanes=8, entity_rows=3)

    def load_balanced():
        store = ActivationStore.open(path, allow_incomplete=True)
        return ShuffledLoader(
            store,
            "layers.2",
            "fit",
            batch_size=64,
            seed=3,
            world=World(),
            coordinates=True,
            settings=settings,
        )

    for stop in (1500, len(rows.entity)):
        with StoreWriter(path, hooks=hooks, layout=layout, seed=0, provenance={}) as writer:
            feed(writer, rows.part(0, stop), start=writer.cursor[0] if writer.cursor else 0)
        if stop == 1500:
            loader = load_balanced()
            state, want = loader.state_dict(), list(loader.batches(30))
    later = load_balanced()
    later.load_state_dict(state)
    assert all(torch.equal(a.x, b.x) for a, b in zip(want, later.batches(30), strict=True))


def test_batches_are_nearly_those_of_a_full_shuffle(tmp_path):
    """Block, window, chunk and batch have about the proportions of the defaults."""
    n, size, length, d = 1 << 16, 64, 50, 4
    entity = np.arange(n) // length
    rng = np.random.default_rng(0)
    # a fifth of the variance is the entity's
    level = rng.standard_normal((n // length + 1, d)) * 0.5
    x = (level[entity] + rng.standard_normal((n, d))).astype(np.float32)
    layout = StoreLayout(block_rows=4096, chunk_rows=16, shard_rows=4096)
    with StoreWriter(tmp_path / "a", hooks={"h": d}, layout=layout, seed=0, provenance={}) as writer:
        for i in range(0, n, 4096):
            s = slice(i, i + 4096)
            p = entity[s]
            writer.append(
                {"h": x[s]}, entity=p, position=np.arange(i, i + 4096), time=p, split=p * 0, cursor=i
            )
    store = ActivationStore.open(tmp_path / "a", allow_incomplete=True)
    config = LoaderConfig(window_rows=4096)
    loader = ShuffledLoader(
        store, "h", "fit", batch_size=size, seed=0, world=World(), coordinates=True, settings=config
    )
    means, met = [], 0
    for b in loader:
        means.append(b.x.numpy().mean(0))
        met += size - len(torch.unique(b.entity))
    shuffled = rng.permutation(entity).reshape(-1, size)
    chance = sum(size - len(np.unique(row)) for row in shuffled)
    assert met <= 2 * chance
    means = np.array(means) - np.mean(means, axis=0)
    assert abs((means[1:] * means[:-1]).mean() / (means**2).mean()) <= 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_formats_are_served_as_stored_and_read_as_float32(tmp_path, rows, write, layout, dtype):
    store = write(tmp_path / "a.zarr", rows, layout=layout.model_copy(update={"dtype": dtype}))
    for window_rows in (200, 10**6):
        b = next(load(store, window_rows=window_rows).batches(1))
        known = {k: i for i, k in enumerate(zip(rows.entity.tolist(), rows.position.tolist(), strict=True))}
        want = rows.acts["layers.2"][[known[k] for k in keys([b])]]
        assert b.x.dtype == torch.float32 and b.acts["layers.2"].dtype == getattr(torch, dtype)
        assert torch.equal(b.x, torch.from_numpy(want).to(getattr(torch, dtype)).float())


def test_what_cannot_be_shared_out_is_refused(stored):
    with pytest.raises(ConfigError, match="cannot share out"):
        load(stored, world=rank(0, 3))
    with pytest.raises(StoreError):
        load(stored, split="test")


def test_damage_reaches_the_caller(tmp_path, rows, write):
    store = write(tmp_path / "a.zarr", rows)
    path = tmp_path / "a.zarr/w0000/fit/acts/layers.2/c.1.0"
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"c\.1\.0 is damaged"):
        list(load(store).batches(40))


def test_a_batch_that_could_not_be_read_comes_next_when_asked_again(stored, monkeypatch):
    whole = keys(load(stored).batches(8))
    loader, fails = load(stored), iter([True])
    gather = Gathering._gather

    def once(self, number):
        if number == 2 and next(fails, False):
            raise StoreError("a passing fault")
        return gather(self, number)

    monkeypatch.setattr(Gathering, "_gather", once)
    served = [loader.next_batch(), loader.next_batch()]
    with pytest.raises(StoreError, match="passing"):
        loader.next_batch()
    assert loader.state_dict()["batch"] == 2
    assert keys([*served, *loader.batches(6)]) == whole


def test_memory_is_given_out_again_only_when_nothing_uses_it():
    recycler = Recycler(kept=8)

    def take() -> torch.Tensor:
        return torch.from_numpy(recycler.take("h", (3, 4), "float32"))

    freed = take().data_ptr()
    assert freed in {t.data_ptr() for t in [take() for _ in range(8)]}
    whole = take()
    weight = torch.ones(4, 2, requires_grad=True)
    used, view, pointers = take(), take()[1:], set()
    pointers |= {whole.data_ptr(), used.data_ptr(), view.data_ptr() - 16}
    graph = used @ weight
    del used
    assert not pointers & {t.data_ptr() for t in [take() for _ in range(20)]}
    graph.sum().backward()
    del graph
    assert pointers & {t.data_ptr() for t in [take() for _ in range(8)]}


def test_batches_that_are_kept_do_not_change(stored):
    loader = load(stored)
    kept = list(loader.batches(50))
    again = load(stored)
    assert all(torch.equal(a.x, b.x) for a, b in zip(kept, again.batches(50), strict=True))
