"""What every kind of source promises; a kind without a case fails."""

import json

import numpy as np
import pytest

from activations_cache.harvest import HarvestConfig, harvest
from activations_cache.sources.base import SourceConfig
from activations_cache.splits import SPLITS
from sae.world import World
from tests.contracts.source_cases import CASES, collect, same, table_of


def test_every_kind_has_a_case():
    assert {name.split(",")[0] for name in CASES} == set(SourceConfig.kinds)


@pytest.mark.parametrize("name", CASES)
def test_a_source_keeps_its_promises(name, build):
    source = build(name)
    first, again = collect(source), collect(build(name))
    assert len(first) > 2
    for a, b in zip(first, again, strict=True):
        same(a, b)
    for a, b in zip(first, collect(source), strict=True):
        same(a, b)
    # who, when, what
    assert sum(len(b.entity) for b in first) == source.n_rows
    known = set(source.entities["entity"].to_pylist())
    assert len(known) == len(source.entities) == len(set(source.entities["id"].to_pylist()))
    for b in first:
        assert set(b.acts) == set(source.hooks)
        for hook, x in b.acts.items():
            assert x.dtype == np.float32
            assert x.shape == (len(b.entity), source.hooks[hook])
            assert np.isfinite(x).all()
        assert set(b.entity.tolist()) <= known
        assert ((b.split >= 0) & (b.split < len(SPLITS))).all()
    at, _ = table_of(first)
    assert len(np.unique(at[:, :2], axis=0)) == len(at), "one row per entity and position"
    json.dumps(source.provenance)
    assert source.provenance == build(name).provenance


@pytest.mark.parametrize("name", CASES)
def test_from_any_cursor_the_rest_follows(name, build):
    source = build(name)
    for world in (World(), World(rank=1, size=2)):
        whole = collect(source, world)
        for i in (0, len(whole) // 2, len(whole) - 1):
            rest = collect(source, world, whole[i].cursor)
            assert len(rest) == len(whole) - i - 1
            for a, b in zip(whole[i + 1 :], rest, strict=True):
                same(a, b)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_holds_the_same_rows(name, build):
    source = build(name)
    at, acts = table_of(collect(source))
    parts = [collect(source, World(rank=rank, size=3)) for rank in range(3)]
    assert sum(bool(part) for part in parts) == 3
    at3, acts3 = table_of([b for part in parts for b in part])
    assert np.array_equal(at, at3)
    for hook, x in acts.items():
        # other batches, so other shapes of the same sums
        np.testing.assert_allclose(acts3[hook], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tensors, npy", "batches", "panel, module, fields", "text, gpt2, packed"])
def test_it_can_be_harvested_and_read_back(name, build, tmp_path):
    source = build(name)
    store = harvest(source, tmp_path / "s.zarr", HarvestConfig(), seed=0, world=World())
    assert store.hooks == source.hooks
    assert sum(store.splits.values()) == source.n_rows
