"""What an evaluation says, against numpy and scikit-learn on the rows of a real store."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import train.evaluate
from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.base import SAEConfig
from sae.config import parse_config
from sae.errors import CheckpointError
from train.evaluate import evaluate_baselines, evaluate_dictionary

HOOK, D_IN = "layers.1", 6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = (rng.laplace(size=(3000, D_IN)) * np.arange(1, D_IN + 1) @ rng.standard_normal((D_IN, D_IN))) + 50
    entity, position = np.arange(3000) // 6, np.arange(3000) % 6
    path = tmp_path_factory.mktemp("store") / "activations.zarr"
    with StoreWriter(path, hooks={HOOK: D_IN}, layout=StoreLayout(), seed=0, provenance={}) as writer:
        writer.append(
            {HOOK: x.astype(np.float32)},
            entity=entity,
            position=position,
            time=position + 200501,
            split=np.array(["fit", "discover", "confirm"])[entity % 3],
            cursor=None,
        )
    seal(path)
    return ActivationStore.open(path)


def rows_of(store, split):
    return np.concatenate([r.acts for r in store.rows(HOOK, split)]).astype(np.float64)


def dictionary():
    config = parse_config(SAEConfig, {"kind": "topk", "d_sae": 16, "k": 3}, where="test")
    sae = config.build(D_IN, generator=torch.Generator().manual_seed(0))
    sae.b_dec.data.fill_(50)
    sae.folded = True
    return sae


def test_a_dictionary_against_numpy(store):
    sae = dictionary()
    report = evaluate_dictionary(store, sae, HOOK, "confirm")
    x = rows_of(store, "confirm")
    x_hat = sae.decode(sae.encode(torch.from_numpy(x).float())).detach().double().numpy()
    about = x - x.mean(0)
    per_dimension = ((x - x_hat) ** 2).sum(0) / (about**2).sum(0)
    spread = report["fvu_per_dimension"]
    assert spread["max"] == pytest.approx(per_dimension.max(), rel=1e-4)
    assert spread["worst"] == per_dimension.argmax()
    assert spread["median"] == pytest.approx(np.median(per_dimension), rel=1e-4)
    hat = x_hat - x.mean(0)
    assert report["shrinkage"] == pytest.approx(1 - (hat**2).sum() / (hat * about).sum(), abs=1e-4)
    for name in ("position", "time"):
        segments = report["segments"][name]
        assert sum(s["rows"] for s in segments) == len(x)
    assert [(s["from"], s["to"]) for s in report["segments"]["position"]] == [(0, 0), (1, 1), (2, 3), (4, 5)]
    assert [s["from"] for s in report["segments"]["time"]] == list(range(200501, 200507))


def test_baselines_against_sklearn(store):
    measured = evaluate_baselines(store, HOOK, ["discover", "confirm"], k=2, seed=0)
    assert set(measured) == {"neurons", "pca"}
    oracle, x = PCA().fit(rows_of(store, "fit")), rows_of(store, "confirm")
    scores = oracle.transform(x)
    scores[np.abs(scores) < np.sort(np.abs(scores), axis=1)[:, [-2]]] = 0
    total = ((x - x.mean(0)) ** 2).sum()
    expected = ((x - oracle.inverse_transform(scores)) ** 2).sum() / total
    assert measured["pca"]["confirm"]["fvu"] == pytest.approx(expected, rel=1e-3)
    about = x - rows_of(store, "fit").mean(0)
    about[np.abs(about) >= np.sort(np.abs(about), axis=1)[:, [-2]]] = 0
    assert measured["neurons"]["confirm"]["fvu"] == pytest.approx((about**2).sum() / total, rel=1e-3)
    assert measured["neurons"]["discover"]["l0"] == pytest.approx(2)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """Rows in the order of their time, which moves them."""
    rng, n = np.random.default_rng(0), 20_000
    time, entity = np.sort(np.arange(n) % 25), rng.integers(0, 1000, n)
    x = rng.standard_normal((n, D_IN)) + time[:, None] * np.ones(D_IN)
    path, layout = tmp_path_factory.mktemp("ordered") / "activations.zarr", StoreLayout(shuffle=False)
    with StoreWriter(path, hooks={HOOK: D_IN}, layout=layout, seed=0, provenance={}) as writer:
        split = np.where(entity < 500, "fit", "confirm")
        rows = {HOOK: x.astype(np.float32)}
        writer.append(rows, entity=entity, position=time, time=time, split=split, cursor=None)
    seal(path)
    return ActivationStore.open(path)


def test_baselines_are_fitted_to_all_of_a_split_however_it_is_stored(ordered, monkeypatch):
    monkeypatch.setattr(train.evaluate, "SAMPLE_ROWS", 500)
    measured = evaluate_baselines(ordered, HOOK, ["confirm"], k=1, seed=0)
    assert measured == evaluate_baselines(ordered, HOOK, ["confirm"], k=1, seed=0)
    assert measured != evaluate_baselines(ordered, HOOK, ["confirm"], k=1, seed=1)
    x, fit = rows_of(ordered, "confirm"), rows_of(ordered, "fit")
    about = x - fit.mean(0)
    total = ((x - x.mean(0)) ** 2).sum()
    scores = PCA(1).fit(fit).inverse_transform(PCA(1).fit(fit).transform(x))
    assert measured["pca"]["confirm"]["fvu"] == pytest.approx(((x - scores) ** 2).sum() / total, rel=0.05)
    about[np.abs(about) >= np.abs(about).max(1, keepdims=True)] = 0
    assert measured["neurons"]["confirm"]["fvu"] == pytest.approx((about**2).sum() / total, rel=0.05)


def test_periods_are_those_of_the_split_however_it_is_stored(ordered):
    report = evaluate_dictionary(ordered, dictionary(), HOOK, "confirm")
    parts = np.array_split(np.arange(25), 12)
    assert [(s["from"], s["to"]) for s in report["segments"]["time"]] == [(p[0], p[-1]) for p in parts]


def test_reconstructions_that_are_not_finite_are_an_error_and_rows_that_do_not_vary_are_none(store, tmp_path):
    sae = dictionary()
    sae.W_dec.data[:] = 3e38
    with pytest.raises(CheckpointError, match=r"(?s)not finite.*layers\.1, split confirm"):
        evaluate_dictionary(store, sae, HOOK, "confirm")
    n = np.arange(10)
    with StoreWriter(
        tmp_path / "a", hooks={HOOK: D_IN}, layout=StoreLayout(), seed=0, provenance={}
    ) as writer:
        x = np.ones((10, D_IN), np.float32)
        writer.append(
            {HOOK: x}, entity=n, position=n * 0, time=n * 0, split=np.full(10, "confirm"), cursor=None
        )
    seal(tmp_path / "a")
    report = evaluate_dictionary(ActivationStore.open(tmp_path / "a"), dictionary(), HOOK, "confirm")
    assert np.isnan(report["fvu"])
