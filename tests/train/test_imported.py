"""A dictionary of another library on the activations of a real store."""

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
from sae.errors import CheckpointError, ConfigError
from sae.exports import Origin, export
from train.evaluate import evaluate_dictionary
from train.imported import ImportConfig, import_dictionary
from train.run import choose_hook

HOOKS = {"layers.0": 6, "layers.1": 4}


@pytest.fixture
def store(tmp_path):
    path, n = tmp_path / "activations.zarr", np.arange(600)
    with StoreWriter(path, hooks=HOOKS, layout=StoreLayout(), seed=0, provenance={}) as writer:
        writer.append(
            {
                hook: torch.randn(600, d, generator=torch.Generator().manual_seed(d)).numpy()
                for hook, d in HOOKS.items()
            },
            entity=n // 6,
            position=n % 6,
            time=n % 6,
            split=np.array(["fit", "confirm"])[n // 6 % 2],
            cursor=None,
        )
    seal(path)
    return path


@pytest.fixture
def sae():
    config = parse_config(SAEConfig, {"kind": "topk", "d_sae": 16, "k": 3}, where="test")
    built = config.build(6, generator=torch.Generator().manual_seed(0))
    built.folded = True
    return built


@pytest.mark.parametrize("format_", ["native", "saelens", "dictionary_learning", "sparsify"])
def test_it_becomes_ours_and_can_be_measured(store, sae, format_, tmp_path):
    export(sae, tmp_path / "theirs", format_, origin=Origin())
    config = ImportConfig(path=tmp_path / "theirs", hook="layers.0")
    text = import_dictionary(store, config, tmp_path / "ours", hook="layers.0")
    assert text == "topk with 16 features of 6 dimensions"
    ours, opened = load_sae(tmp_path / "ours"), ActivationStore.open(store)
    extra = read_header(tmp_path / "ours")["extra"]
    assert extra["hook"] == "layers.0" and extra["store"] == opened.digest()
    assert extra["imported"]["path"] == str(tmp_path / "theirs")
    here, there = (evaluate_dictionary(opened, s, "layers.0", "confirm") for s in (ours, sae))
    assert here["fvu"] == pytest.approx(there["fvu"], rel=1e-5)
    assert here["l0"] == there["l0"]
    assert {p.name for p in config.files()} == {p.name for p in (tmp_path / "theirs").iterdir()}


def test_what_does_not_fit_is_refused(store, sae, tmp_path):
    export(sae, tmp_path / "theirs", "sparsify", origin=Origin())
    with pytest.raises(CheckpointError, match=r"(?s)layers\.1.*d_in 6.*d_in 4"):
        import_dictionary(store, ImportConfig(path=tmp_path / "theirs"), tmp_path / "ours", hook="layers.1")
    with pytest.raises(CheckpointError, match="sae_weights"):
        import_dictionary(
            store,
            ImportConfig(path=tmp_path / "theirs", format="saelens"),
            tmp_path / "ours",
            hook="layers.0",
        )
    assert ImportConfig(path=tmp_path / "nowhere").files() == []
    with pytest.raises(ConfigError, match=r"no dictionary\.hook"):
        choose_hook(ImportConfig(path=tmp_path), HOOKS)
    assert choose_hook(ImportConfig(path=tmp_path, hook="layers.1"), HOOKS) == "layers.1"
