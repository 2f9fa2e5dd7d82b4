"""Baselines against scikit-learn and brute force, and as dictionaries."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.decomposition import PCA, MiniBatchNMF
from sklearn.linear_model import orthogonal_mp

from sae.baselines import BASELINES, as_topk, fit_baseline
from sae.dictionary import Dictionary
from sae.errors import ConfigError
from sae.metrics import Firing, Variance

D_IN, ROWS, K = 6, 400, 3


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    sources = rng.laplace(size=(ROWS, D_IN)) * np.array([9, 5, 3, 1, 0.5, 0.2])
    return torch.from_numpy(sources @ rng.standard_normal((D_IN, D_IN)) + 50).float()


def fvu(baseline, x):
    variance = Variance()
    variance.update(x, baseline.decode(baseline.encode(x)))
    return variance.fvu


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_it_is_a_dictionary(name, x):
    baseline = fit_baseline(name, x, D_IN, k=K, seed=0)
    assert isinstance(baseline, Dictionary)
    codes = baseline.encode(x)
    assert codes.rows == ROWS
    assert (codes.values > 0).all()
    assert baseline.W_dec.shape == (baseline.d_sae, baseline.d_in) and baseline.d_in == D_IN
    firing = Firing.empty(baseline.d_sae)
    firing.update(codes)
    assert 0 < firing.l0 <= K
    assert int(codes.offsets.diff().max()) <= K
    torch.testing.assert_close(
        baseline.decode(codes), codes.to_dense(baseline.d_sae) @ baseline.W_dec + baseline.b_dec
    )
    alone = torch.cat([baseline.encode(x[i : i + 1]).to_dense(baseline.d_sae) for i in range(5)])
    torch.testing.assert_close(codes.to_dense(baseline.d_sae)[:5], alone, rtol=1e-3, atol=1e-3)
    assert fvu(baseline, x) < 0.9
    again = fit_baseline(name, x, D_IN, k=K, seed=0)
    assert torch.equal(again.W_dec, baseline.W_dec)


def test_neurons_are_the_coordinates_by_sign(x):
    baseline = fit_baseline("neurons", x, 99, k=2 * D_IN)
    z = baseline.encode(x).to_dense(2 * D_IN)
    centred = x - x.mean(0)
    assert torch.equal(z[:, 0::2], centred.clamp(min=0))
    assert torch.equal(z[:, 1::2], (-centred).clamp(min=0))
    assert fvu(baseline, x) == pytest.approx(0, abs=1e-9)
    kept = fit_baseline("neurons", x, D_IN, k=2).encode(x).to_dense(2 * D_IN)
    largest = centred.abs().topk(2).indices.sort(dim=1).values
    assert torch.equal((kept > 0).nonzero()[:, 1].view(-1, 2) // 2, largest)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pca_keeps_the_largest_scores_of_sklearns(x, k):
    oracle = PCA().fit(x.double().numpy())
    scores = oracle.transform(x.double().numpy())
    order = np.argsort(-np.abs(scores), axis=1)
    pruned = np.zeros_like(scores)
    np.put_along_axis(pruned, order[:, :k], np.take_along_axis(scores, order[:, :k], 1), 1)
    baseline = fit_baseline("pca", x, D_IN, k=k)
    assert baseline.decode(baseline.encode(x)).numpy() == pytest.approx(
        oracle.inverse_transform(pruned), abs=1e-3
    )


def test_with_all_features_pca_and_ica_reconstruct(x):
    for name in ("pca", "ica"):
        assert fvu(fit_baseline(name, x, D_IN, k=2 * D_IN), x) == pytest.approx(0, abs=1e-6)


def test_ica_finds_the_sources():
    rng = np.random.default_rng(1)
    sources, mixing = rng.laplace(size=(4000, 4)), rng.standard_normal((4, 4))
    x = torch.from_numpy(sources @ mixing).float()
    z = fit_baseline("ica", x, 4, k=8).encode(x).to_dense(8).numpy()
    found = z[:, 0::2] - z[:, 1::2]
    best = np.abs(np.corrcoef(found.T, sources.T)[:4, 4:]).max(0)
    assert (best > 0.95).all()


def test_dictionary_learning_pursues_like_sklearns_omp(x):
    baseline = fit_baseline("dictionary_learning", x, 10, k=2)
    atoms = baseline.W_dec[0::2].double().numpy()
    expected = orthogonal_mp(atoms.T, (x - x.mean(0)).double().numpy().T, n_nonzero_coefs=2).T @ atoms
    got = (baseline.decode(baseline.encode(x)) - baseline.b_dec).numpy()
    assert got == pytest.approx(expected, abs=1e-2)
    assert fvu(baseline, x) < fvu(fit_baseline("random_directions", x, 10, k=2), x)


def test_random_directions_pursue_what_is_left(x):
    baseline = fit_baseline("random_directions", x, 20, k=1, seed=3)
    D = baseline.W_dec[0::2]
    torch.testing.assert_close(D.norm(dim=1), torch.ones(20))
    along = (x - x.mean(0)) @ D.T
    best = along.abs().argmax(1)
    codes = baseline.encode(x)
    assert torch.equal(codes.features // 2, best)
    torch.testing.assert_close(codes.values, along.abs().amax(1))
    errors = [fvu(fit_baseline("random_directions", x, 20, k=k, seed=3), x) for k in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_nmf_codes_are_the_non_negative_least_squares():
    rng = np.random.default_rng(2)
    parts = rng.random((3, 5)) * (rng.random((3, 5)) < 0.6)
    x = torch.from_numpy(rng.random((500, 3)) @ parts).float() + 7
    baseline = fit_baseline("nmf", x, 4, k=4)
    centred = (x - x.mean(0)).double().numpy()
    scale = np.sqrt((centred**2).mean())
    split = np.concatenate([np.maximum(centred, 0), np.maximum(-centred, 0)], 1)
    found = MiniBatchNMF(4, init="nndsvda", batch_size=1024, max_iter=200, random_state=0).fit(split / scale)
    expected = np.stack([nnls(found.components_.T, row)[0] for row in split])
    assert baseline.encode(x).to_dense(4).numpy() == pytest.approx(expected, abs=2e-3)
    assert fvu(baseline, x) < 0.3


@pytest.mark.parametrize("name", ["neurons", "pca", "ica", "sparse_pca"])
def test_linear_baselines_are_topk_dictionaries(name, x):
    baseline = fit_baseline(name, x, D_IN, k=K, seed=0)
    sae = as_topk(baseline)
    assert sae.folded
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))
    ours, theirs = baseline.encode(x), sae.encode(x)
    assert torch.equal(ours.features, theirs.features)
    torch.testing.assert_close(baseline.decode(ours), sae.decode(theirs).detach(), rtol=1e-4, atol=1e-3)


def test_wrong_requests_are_refused(x):
    with pytest.raises(ConfigError, match="which are linear"):
        as_topk(fit_baseline("nmf", x, 4, k=2))
    with pytest.raises(ConfigError, match="neurons"):
        fit_baseline("kmeans", x, 4, k=2)
    with pytest.raises(ConfigError, match="above 0"):
        fit_baseline("pca", x, 0, k=2)
