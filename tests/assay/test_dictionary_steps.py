"""Measuring a dictionary of a run, without the stages before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import assay.steps.dictionary
from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.writer import StoreWriter
from assay.config import RunConfig
from assay.console import Console
from assay.stages import Context
from sae.base import SAEConfig
from sae.checkpoint import save_sae
from sae.config import parse_config
from sae.world import World

RUN = {"name": "measured", "source": {"kind": "tensors", "path": "x.npy"}, "harvest": {}, "evaluate": {}}


def test_what_is_true_of_a_dictionary_on_any_rows_is_computed_once(tmp_path, monkeypatch):
    n = np.arange(300)
    with StoreWriter(
        tmp_path / "activations.zarr", hooks={"h": 4}, layout=StoreLayout(), seed=0, provenance={}
    ) as writer:
        x = np.random.default_rng(0).standard_normal((300, 4), dtype=np.float32)
        split = np.array(["fit", "discover", "confirm"])[n % 3]
        writer.append({"h": x}, entity=n, position=n * 0, time=n * 0, split=split, cursor=None)
    seal(tmp_path / "activations.zarr")
    sae = parse_config(SAEConfig, {"kind": "topk", "d_sae": 8, "k": 2}, where="test").build(
        4, generator=torch.Generator().manual_seed(0)
    )
    sae.folded = True
    save_sae(sae, tmp_path / "sae" / "theirs")
    calls = []
    coherence = assay.steps.dictionary.coherence
    monkeypatch.setattr(
        assay.steps.dictionary, "coherence", lambda W_dec: (calls.append(W_dec), coherence(W_dec))[1]
    )
    config = parse_config(
        RunConfig, {**RUN, "out": str(tmp_path), "dictionary": {"path": "theirs"}}, where="test"
    )
    record = assay.steps.dictionary.measure(Context(config, tmp_path, World(), Console()), "theirs")
    assert len(calls) == 1
    unit = sae.W_dec.detach().double().numpy()
    cosines = np.abs(unit @ unit.T) - np.eye(8)
    for split in ("discover", "confirm"):
        found = record[split]["coherence"]
        assert found["max"] == pytest.approx(cosines.max())
        assert found["mean"] == pytest.approx(cosines.max(1).mean())
