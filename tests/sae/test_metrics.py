"""Each metric against numpy or scikit-learn, and against itself on other splits into batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.codes import from_dense
from sae.metrics import Firing, Segments, Variance, coherence, is_dead, match


def rows(seed, n=60, d_in=5, d_sae=8):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d_in)) * 3 + 1e4
    z = rng.random((n, d_sae)) * (rng.random((n, d_sae)) < np.linspace(0, 1, d_sae))
    return torch.from_numpy(x), torch.from_numpy(x + rng.standard_normal((n, d_in))), torch.from_numpy(z)


def test_against_numpy():
    x, x_hat, z = rows(0)
    firing, variance = Firing.empty(8), Variance()
    firing.update(from_dense(z))
    variance.update(x, x_hat)
    fired = z.numpy() > 0
    assert firing.l0 == pytest.approx(fired.sum(1).mean())
    assert firing.rates.numpy() == pytest.approx(fired.mean(0))
    assert firing.dead == (fired.sum(0) == 0).mean()
    assert firing.dense == (fired.mean(0) > 0.5).mean()
    assert sum(firing.histogram().values()) == 8
    assert firing.histogram()["never"] == 1
    total = (x.numpy() - x.numpy().mean(0)) ** 2
    residual = (x.numpy() - x_hat.numpy()) ** 2
    assert variance.fvu == pytest.approx(residual.sum() / total.sum(), rel=1e-9)
    assert variance.fvu_per_dimension.numpy() == pytest.approx(residual.sum(0) / total.sum(0), rel=1e-9)
    about, about_hat = x.numpy() - x.numpy().mean(0), x_hat.numpy() - x.numpy().mean(0)
    assert variance.shrinkage == pytest.approx(1 - (about_hat**2).sum() / (about * about_hat).sum(), rel=1e-6)


@given(cuts=st.lists(st.integers(1, 59), max_size=8), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_split_into_batches_does_not_matter(cuts, seed):
    x, x_hat, z = rows(seed)
    whole, parts = (Firing.empty(8), Variance()), (Firing.empty(8), Variance())
    whole[0].update(from_dense(z))
    whole[1].update(x, x_hat)
    edges = [0, *sorted(set(cuts)), 60]
    for low, high in pairwise(edges):
        firing, variance = Firing.empty(8), Variance()
        firing.update(from_dense(z[low:high]))
        variance.update(x[low:high], x_hat[low:high])
        parts[0].merge(firing)
        parts[1].merge(variance)
    assert torch.equal(parts[0].counts, whole[0].counts)
    assert parts[0].l0 == whole[0].l0
    assert parts[1].fvu == pytest.approx(whole[1].fvu, rel=1e-9)
    assert parts[1].shrinkage == pytest.approx(whole[1].shrinkage, rel=1e-6, abs=1e-9)


def test_segments_against_numpy_and_blind_to_batches():
    x, x_hat, z = rows(2)
    segment = torch.from_numpy(np.random.default_rng(0).integers(-1, 3, 60))
    whole, parts = Segments(), Segments()
    whole.update(x, x_hat, from_dense(z), segment=segment)
    for low, high in pairwise([0, 7, 8, 40, 60]):
        part = Segments()
        part.update(x[low:high], x_hat[low:high], from_dense(z[low:high]), segment=segment[low:high])
        parts.merge(part)
    mean = x.numpy().mean(0)
    for measured in (whole.compute(), parts.compute()):
        assert list(measured) == sorted(set(segment.tolist()))
        for key, found in measured.items():
            at = segment.numpy() == key
            residual = ((x - x_hat).numpy()[at] ** 2).sum()
            assert found["rows"] == at.sum()
            assert found["fvu"] == pytest.approx(residual / ((x.numpy()[at] - mean) ** 2).sum(), rel=1e-9)
            assert found["l0"] == pytest.approx((z.numpy()[at] > 0).sum(1).mean())


def test_shrinkage_is_the_share_that_is_missing():
    x, _, _ = rows(3)
    for share in (0.0, 0.25, -0.5):
        variance = Variance()
        variance.update(x, x.mean(0) + (1 - share) * (x - x.mean(0)))
        assert variance.shrinkage == pytest.approx(share, abs=1e-6)
    # a projection leaves variance out and shrinks nothing
    _, _, V = torch.linalg.svd(x - x.mean(0))
    projected = Variance()
    projected.update(x, x.mean(0) + (x - x.mean(0)) @ V[:2].T @ V[:2])
    assert projected.shrinkage == pytest.approx(0, abs=1e-6)
    assert projected.fvu > 0.1


def test_fvu_of_the_mean_is_one_and_of_constant_data_unknown():
    x, _, _ = rows(1)
    variance = Variance()
    variance.update(x, x.mean(0).expand_as(x))
    assert variance.fvu == pytest.approx(1)
    constant = Variance()
    constant.update(torch.ones(4, 2), torch.ones(4, 2))
    assert np.isnan(constant.fvu)
    assert constant.fvu_per_dimension.isnan().all()
    assert np.isnan(constant.shrinkage)


def test_matching_finds_a_hidden_permutation():
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.standard_normal((6, 10)))
    order, signs = rng.permutation(6), rng.choice([-1, 1], 6)
    noise = torch.from_numpy(rng.standard_normal((3, 10)))
    W = torch.cat([truth[order] * torch.from_numpy(signs[:, None] * rng.uniform(0.1, 9, (6, 1))), noise])
    found = match(W, truth)
    assert found.mcc == pytest.approx(1)
    assert dict(zip(found.features.tolist(), found.truths.tolist(), strict=True)) == dict(
        enumerate(order.tolist())
    )
    random = match(torch.from_numpy(rng.standard_normal((6, 10))), truth)
    assert 0 < random.mcc < 0.9


def test_coherence_is_the_largest_cosine_with_another():
    W = torch.tensor([[1.0, 0], [-2, 0], [0, 3], [1, 1]])
    expected = [1, 1, 0.5**0.5, 0.5**0.5]
    assert coherence(W).tolist() == pytest.approx(expected)
    assert coherence(W, rows_at_once=3).tolist() == pytest.approx(expected)
    assert coherence(torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coherence_is_computed_in_float32_and_leaves_the_directions_alone(dtype):
    W = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 6))).to(dtype)
    before = W.clone()
    unit = W.double().numpy() / np.linalg.norm(W.double().numpy(), axis=1, keepdims=True)
    cosines = np.abs(unit @ unit.T)
    np.fill_diagonal(cosines, 0)
    found = coherence(W, rows_at_once=7)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(cosines.max(1).tolist(), rel=1e-5)
    assert torch.equal(W, before)


def test_dead_is_silence_of_at_least_the_window():
    assert is_dead(torch.tensor([0, 9, 10, 11]), 10).tolist() == [False, False, True, True]
