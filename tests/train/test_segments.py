"""Segments of rows against their definition."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import train.segments
from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.store import ActivationStore, StoredRows
from activations_cache.writer import StoreWriter
from sae.codes import from_dense
from train.segments import MOST_STRETCHES, RowSegments, find_stretches


def write(path, time):
    """A store of rows that stay in the order they came in, all of one split."""
    layout, n = StoreLayout(shuffle=False), np.arange(len(time))
    with StoreWriter(path, hooks={"h": 1}, layout=layout, seed=0, provenance={}) as writer:
        split = np.full(len(n), "fit")
        x = np.zeros((len(n), 1), np.float32)
        writer.append({"h": x}, entity=n, position=n * 0, time=time, split=split, cursor=None)
    seal(path)
    return ActivationStore.open(path)


def measured(position, time, starts=(0,), batches=3):
    rng = np.random.default_rng(0)
    found, n = RowSegments(np.array(starts)), len(position)
    for part in np.array_split(rng.permutation(n), batches):
        x = torch.randn(len(part), 4)
        rows = StoredRows(x.numpy(), part, position[part], time[part])
        found.update(x, x * 0.5, from_dense(torch.ones(len(part), 2)), rows)
    return found.compute()


def test_positions_double():
    position = np.arange(40)
    bounds = [(s["from"], s["to"], s["rows"]) for s in measured(position, position * 0)["position"]]
    assert bounds == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 15, 8), (16, 31, 16), (32, 39, 8)]


def test_few_periods_stand_alone_and_many_share(tmp_path):
    few = np.array([200501, 200502, 200504] * 50)
    starts = find_stretches(write(tmp_path / "few.zarr", few), "fit")
    assert [(s["from"], s["to"]) for s in measured(few * 0, few, starts)["time"]] == [
        (t, t) for t in sorted(set(few))
    ]
    many = np.repeat(np.arange(100), 30)
    starts = find_stretches(write(tmp_path / "many.zarr", many), "fit")
    stretches = measured(many * 0, many, starts)["time"]
    assert len(stretches) == MOST_STRETCHES
    assert stretches[0]["from"] == 0 and stretches[-1]["to"] == 99
    assert all(a["to"] < b["from"] for a, b in pairwise(stretches))
    assert sum(s["rows"] for s in stretches) == 3000
    assert all(s["l0"] == 2 for s in stretches)


@pytest.mark.parametrize("most", [2**16, 40])
@pytest.mark.parametrize("ordered", [True, False])
def test_stretches_are_those_of_the_whole_split_in_whatever_order_it_is_read(
    ordered, most, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    time = np.sort(rng.integers(-3000, 50_000, 2000))
    store = write(tmp_path / "a.zarr", time if ordered else rng.permutation(time))
    monkeypatch.setattr(train.segments, "MOST_PERIODS", most)
    monkeypatch.setattr(train.segments, "ROWS_AT_ONCE", 128)
    width = 1
    while len(periods := np.unique(time // width)) > most:
        width *= 2
    expected = [part[0] * width for part in np.array_split(periods, MOST_STRETCHES)]
    assert find_stretches(store, "fit").tolist() == expected
