"""Segments of rows against their definition."""

from itertools import pairwise

import numpy as np
import torch

from activations_cache.store import StoredRows
from sae.codes import from_dense
from train.segments import MOST_STRETCHES, RowSegments


def measured(position, time, batches=3):
    rng = np.random.default_rng(0)
    found, n = RowSegments(), len(position)
    for part in np.array_split(rng.permutation(n), batches):
        x = torch.randn(len(part), 4)
        rows = StoredRows(x.numpy(), part, position[part], time[part])
        found.update(x, x * 0.5, from_dense(torch.ones(len(part), 2)), rows)
    return found.compute()


def test_positions_double():
    position = np.arange(40)
    bounds = [(s["from"], s["to"], s["rows"]) for s in measured(position, position * 0)["position"]]
    assert bounds == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 15, 8), (16, 31, 16), (32, 39, 8)]


def test_few_periods_stand_alone_and_many_share():
    few = np.array([200501, 200502, 200504] * 50)
    assert [(s["from"], s["to"]) for s in measured(few * 0, few)["time"]] == [
        (t, t) for t in sorted(set(few))
    ]
    many = np.repeat(np.arange(100), 30)
    stretches = measured(many * 0, many)["time"]
    assert len(stretches) == MOST_STRETCHES
    assert stretches[0]["from"] == 0 and stretches[-1]["to"] == 99
    assert all(a["to"] < b["from"] for a, b in pairwise(stretches))
    assert sum(s["rows"] for s in stretches) == 3000
    assert all(s["l0"] == 2 for s in stretches)
