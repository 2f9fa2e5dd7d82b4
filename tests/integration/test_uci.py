"""The real UCI panel, where it is at hand: read right, and the whole way walked in small."""

import json
from pathlib import Path

import numpy as np
import pytest

from activations_cache.panel import Panel
from activations_cache.prepare import prepare
from assay.config import RunConfig
from label.tables import read_table
from sae.config import load_config
from tests.assay.test_run import assay

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "uci_default.yaml"
SMALL = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_ff=64",
    "fit.epochs=3",
    "harvest.hooks=[layers.0]",
    "sae.d_sae=96",
    "sae.k=6",
    "train.rows=150000",
    "label.n_bootstrap=100",
    "label.n_permutations=10",
    "label.ablation_entities=60",
    "label.n_random=3",
]


def test_the_published_counts_come_out(uci, tmp_path):
    config = load_config(RunConfig, CONFIG, [f"panel.path={uci}"])
    profile = prepare(config.panel, tmp_path)
    assert (profile["rows"], profile["entities"]) == (180_000, 30_000)
    assert profile["outcome_rate"] == pytest.approx(6636 / 30_000)
    panel = Panel.open(tmp_path)
    # a payment settles the bill of the month before, not of its own month
    bal, pay = (panel.values[:, panel.columns.index(n)].reshape(30_000, 6) for n in ("bal", "pay"))
    paid = pay[:, 1:] > 0
    assert 0.13 < np.mean((pay[:, 1:] == bal[:, :-1])[paid]) < 0.25
    assert np.mean((pay[:, 1:] == bal[:, 1:])[paid]) < 0.05


@pytest.mark.xdist_group("uci")
def test_the_whole_way_on_real_data(uci, tmp_path):
    run = tmp_path / "run"
    done = assay("run", CONFIG, f"panel.path={uci}", f"out={run}", *SMALL, cwd=CONFIG.parents[1])
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "labels" / "summary.json").read_text())
    assert summary["fidelity"]["auc_model"] > 0.74
    assert abs(summary["fidelity"]["auc_spliced"] - summary["fidelity"]["auc_model"]) < 0.05
    assert sum(summary["controls"].values()) <= 0.01 * summary["n_features"]
    assert summary["n_labelled"] > 0
    rows = read_table(run / "labels", "features").to_pylist()
    restated = [r for r in rows if r["status"] == "labelled" and r["concept"] == "dpd60_now"]
    # one column says it exactly, so no feature can be credited with having learned it
    assert restated
    assert not any(r["learned"] for r in restated)
    assert all("restates" in r["description"] for r in restated)
