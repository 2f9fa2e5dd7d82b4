import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sae import geometry
from sae.geometry import (
    ROWS_AT_ONCE,
    geometric_median,
    normalise_rows_,
    project_rows_,
    unit_rows,
)


def test_unit_rows_are_unit_and_repeat():
    a, b = (unit_rows(50, 7, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(50))


def test_projection_takes_out_the_part_along_the_row():
    W = unit_rows(ROWS_AT_ONCE + 3, 7, generator=torch.Generator().manual_seed(0))
    g = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    before = g.clone()
    project_rows_(g, W)
    torch.testing.assert_close((g * W).sum(1), torch.zeros(len(W)), atol=1e-5, rtol=0)
    torch.testing.assert_close(g, before - (before * W).sum(1, keepdim=True) * W)


def test_normalising_leaves_a_zero_row_alone():
    W = torch.tensor([[3.0, 4], [0, 0]])
    normalise_rows_(W)
    torch.testing.assert_close(W, torch.tensor([[0.6, 0.8], [0, 0]]))


def test_geometric_median_against_a_minimiser():
    x = torch.from_numpy(np.random.default_rng(0).standard_t(2, (200, 3)))
    oracle = minimize(lambda m: np.linalg.norm(x.numpy() - m, axis=1).sum(), np.zeros(3), tol=1e-10).x
    assert geometric_median(x, tolerance=1e-9).numpy() == pytest.approx(oracle, abs=1e-4)


def test_geometric_median_of_equal_rows():
    assert torch.equal(geometric_median(torch.ones(5, 2)), torch.ones(2))


def test_a_part_of_the_rows_has_the_bits_of_the_whole_and_little_memory(monkeypatch):
    monkeypatch.setattr(geometry, "DRAWN_AT_ONCE", 16 * ROWS_AT_ONCE)
    rows, d_in = 3 * ROWS_AT_ONCE + 10, 16
    whole = unit_rows(rows, d_in, generator=torch.Generator().manual_seed(3))
    for part in (range(0, 7), range(ROWS_AT_ONCE - 1, 2 * ROWS_AT_ONCE + 5), range(rows - 2, rows)):
        own = unit_rows(rows, d_in, generator=torch.Generator().manual_seed(3), part=part)
        assert torch.equal(own, whole[part.start : part.stop])
        assert own.untyped_storage().nbytes() == own.nbytes
