"""From a real store to a saved dictionary and its evaluation."""

import numpy as np
import pytest
import torch

from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.base import SAEConfig
from sae.checkpoint import load_sae, read_header
from sae.config import parse_config
from sae.errors import CheckpointError, StoreError
from sae.metrics import match
from sae.world import World
from train.evaluate import evaluate_dictionary
from train.plan import TrainConfig
from train.run import train_sae

HOOK = "layers.1"
CONFIG = parse_config(SAEConfig, {"kind": "batch_topk", "d_sae": 64, "k": 2}, where="test")
TRAIN = TrainConfig(rows=120_000, checkpoint_every=100)


@pytest.fixture(scope="module")
def planted(plant_rows):
    made = plant_rows(20_000, d_in=32, features=48, l0=2)
    return made._replace(x=made.x * 40 + 100)


def write(path, x):
    entity = np.arange(len(x)) // 10
    names = np.array(["fit", "fit", "fit", "discover", "confirm"])
    with StoreWriter(
        path, hooks={HOOK: x.shape[1]}, layout=StoreLayout(), seed=0, provenance={"model": "planted"}
    ) as writer:
        writer.append(
            {HOOK: x},
            entity=entity,
            position=np.arange(len(x)) % 10,
            time=np.arange(len(x)) % 10,
            split=names[entity % 5],
            cursor=None,
        )
    seal(path)
    return path


@pytest.fixture(scope="module")
def store(planted, tmp_path_factory):
    return write(tmp_path_factory.mktemp("store") / "activations.zarr", planted.x.numpy())


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = train_sae(
        store, CONFIG, TRAIN, folder / "out", hook=HOOK, work=folder / "work", seed=0, world=World()
    )
    return folder, result


def test_the_dictionary_is_folded_and_finds_the_directions(trained, planted):
    folder, result = trained
    sae = load_sae(folder / "out")
    assert sae.folded
    assert match(sae.W_dec, planted.directions).mcc > 0.9
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    extra = read_header(folder / "out")["extra"]
    assert extra["hook"] == HOOK
    assert extra["plan"]["rows"] == 120_000
    assert (folder / "out" / "metrics.jsonl").read_text() == (folder / "work" / "metrics.jsonl").read_text()
    assert result.metrics["step"] == result.plan.steps


def test_evaluation_agrees_with_numpy(trained, store):
    sae, opened = load_sae(trained[0] / "out"), ActivationStore.open(store)
    report = evaluate_dictionary(opened, sae, HOOK, "confirm")
    x = np.concatenate([rows.acts for rows in opened.rows(HOOK, "confirm")]).astype(np.float64)
    weights = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    z = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    z *= z > weights["threshold"]
    error = x - z @ weights["W_dec"] - weights["b_dec"]
    assert report["rows"] == len(x)
    assert report["fvu"] == pytest.approx((error**2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-3)
    assert report["l0"] == pytest.approx((z > 0).sum(1).mean(), rel=1e-3)
    assert report["l0"] == pytest.approx(CONFIG.k, rel=0.15)
    assert report["dead"] == pytest.approx((z > 0).any(0).size and 1 - (z > 0).any(0).mean())
    assert sum(report["firing_rates"].values()) == 64


def test_the_same_again_gives_the_same_bits(trained, store, tmp_path):
    train_sae(
        store, CONFIG, TRAIN, tmp_path / "out", hook=HOOK, work=tmp_path / "work", seed=0, world=World()
    )
    name = "weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained[0] / "out" / name).read_bytes()


def test_an_interrupted_run_ends_with_the_same_bits(trained, store, tmp_path):
    def stop(done, total, text):
        if done >= 250:
            raise RuntimeError("power cut")

    arguments = (store, CONFIG, TRAIN, tmp_path / "out")
    options = {"hook": HOOK, "work": tmp_path / "work", "seed": 0, "world": World()}
    with pytest.raises(RuntimeError, match="power cut"):
        train_sae(*arguments, **options, progress=stop)
    assert not (tmp_path / "out").exists()
    train_sae(*arguments, **options)
    name = "weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained[0] / "out" / name).read_bytes()


def test_what_cannot_be_evaluated_is_refused(trained, store):
    opened, sae = ActivationStore.open(store), load_sae(trained[0] / "out")
    with pytest.raises(StoreError, match=r"layers\.9"):
        evaluate_dictionary(opened, sae, "layers.9", "confirm")
    raw = CONFIG.build(32, generator=torch.Generator())
    with pytest.raises(CheckpointError, match="fold"):
        evaluate_dictionary(opened, raw, HOOK, "confirm")
    narrow = CONFIG.build(8, generator=torch.Generator())
    narrow.folded = True
    with pytest.raises(CheckpointError, match="d_in 8"):
        evaluate_dictionary(opened, narrow, HOOK, "confirm")


def test_rows_that_do_not_vary_are_refused(tmp_path):
    path = write(tmp_path / "flat.zarr", np.ones((600, 4), np.float32))
    with pytest.raises(StoreError, match="do not vary"):
        train_sae(
            path, CONFIG, TRAIN, tmp_path / "out", hook=HOOK, work=tmp_path / "work", seed=0, world=World()
        )


def test_settings_of_the_loader_reach_it(store, tmp_path):
    def weights(name, loader):
        config = TrainConfig.model_validate({"rows": 2560, "loader": loader})
        train_sae(
            store,
            CONFIG,
            config,
            tmp_path / name,
            hook=HOOK,
            work=tmp_path / f"{name}.work",
            seed=0,
            world=World(),
        )
        return load_sae(tmp_path / name).W_enc

    assert torch.equal(weights("plain", {}), weights("threads", {"threads": 1}))
    assert not torch.equal(weights("again", {}), weights("capped", {"entity_rows": 3}))
