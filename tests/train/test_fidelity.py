"""Splicing and ablation, against single histories walked one by one with a plain forward hook."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from activations_cache.panel import Panel, PanelConfig
from activations_cache.prepare import prepare
from activations_cache.reference.columns import model_config
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.reference.histories import collate
from activations_cache.reference.shape import ModelShape
from activations_cache.splits import SPLITS
from sae.baselines import fit_baseline
from train.fidelity import EvaluateConfig, evaluate_fidelity, replacements, splice

CUT, D = 9, 16
HOOK = "layers.0"


@pytest.fixture(scope="module", params=["entity", "row"])
def book(request, tmp_path_factory):
    """A panel with a time cut and an audit column, and a small model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    length = rng.integers(2, 12, 400)
    entity = np.repeat(np.arange(400), length)
    time = np.concatenate([np.arange(n) for n in length]) + np.repeat(rng.integers(0, 4, 400), length)
    outcome = rng.integers(0, 2, len(entity)).astype(float)
    outcome[rng.random(len(entity)) < 0.2] = np.nan
    if request.param == "entity":
        outcome = rng.integers(0, 2, 400).astype(float)[entity]
    sex = np.where(entity % 2 == 0, "f", "m")
    table = {"id": entity, "t": time, "x": rng.normal(size=len(entity)), "y": outcome, "sex": sex}
    pq.write_table(pa.table(table), folder / "raw.parquet")
    config = PanelConfig(
        path=str(folder / "raw.parquet"),
        entity="id",
        time="t",
        columns={"x": "x"},
        audit={"sex": "sex"},
        outcome="case when isnan(y) then null else y end",
        outcome_per=request.param,
        split={"out_of_time": CUT},
    )
    prepare(config, folder)
    panel = Panel.open(folder)
    torch.manual_seed(0)
    shape = ModelShape(d_model=D, n_layers=2, n_heads=2, d_ff=32, dropout=0.0)
    dims = shape.model_dump(exclude={"kind", "n_knots"})
    rows = np.ones(len(panel.time), dtype=bool)
    return folder, panel, CreditTransformer(model_config(panel, rows, n_knots=8, shape=dims)).eval()


@pytest.fixture(scope="module")
def pca(book):
    """Principal components on activations at the hook: all of them reconstruct exactly, two of them do not."""
    _, panel, model = book
    kept = []
    handle = model.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out.detach()))
    for code in range(200):
        one = collate(panel, np.array([code]))
        model(one.values, one.gap)
    handle.remove()
    x = torch.cat([k.reshape(-1, D) for k in kept])
    return {k: fit_baseline("pca", x, D, k=k) for k in (2, D)}, x.mean(0)


def one_by_one(panel, model, change, out_of_time):
    """Logit of every judged row, by row of the panel."""
    found = {}
    handle = model.layers[0].register_forward_hook(lambda _m, _a, out: change(out))
    late = panel.split == SPLITS.index("out_of_time")
    for code in np.flatnonzero(panel.entity_split == SPLITS.index("confirm")):
        rows = np.arange(panel.offsets[code], panel.offsets[code + 1])
        seen = rows if out_of_time else rows[~late[rows]]
        if not len(seen):
            continue
        gap = np.diff(panel.time[seen], prepend=panel.time[seen[0]] - 1) - 1
        with torch.no_grad():
            logit = model(torch.from_numpy(panel.values[seen])[None], torch.from_numpy(gap)[None])
        known = np.isfinite(panel.outcome[seen])
        judged = seen == seen[-1] if panel.outcome_per == "entity" else known
        for at in np.flatnonzero(judged & (late[seen] == out_of_time)):
            found[int(seen[at])] = float(logit.default_logit[0, at])
    handle.remove()
    return found


@pytest.mark.parametrize("out_of_time", [False, True])
def test_replaced_activations_give_what_replacing_them_by_hand_gives(book, pca, out_of_time):
    _, panel, model = book
    dictionaries, mean = pca
    sae = dictionaries[2]
    found = splice(model, panel, HOOK, replace=replacements(sae, mean), out_of_time=out_of_time)
    by_hand = {
        "model": lambda x: None,
        "spliced": lambda x: sae.decode(sae.encode(x[0]))[None],
        "zero": lambda x: x * 0,
        "mean": lambda x: x * 0 + mean,
    }
    for name, change in by_hand.items():
        expected = one_by_one(panel, model, change, out_of_time)
        assert sorted(expected) == sorted(found.rows.tolist())
        np.testing.assert_allclose(
            found.logits[name], [expected[r] for r in found.rows], rtol=1e-4, atol=1e-5
        )
    assert np.abs(found.logits["spliced"] - found.logits["model"]).max() > 1e-3
    np.testing.assert_allclose(found.logits["error_kept"], found.logits["model"], rtol=1e-4, atol=1e-5)


def test_resuming_and_hooking_are_the_same(book, pca):
    _, panel, model = book
    dictionaries, mean = pca
    replace = replacements(dictionaries[2], mean)
    resumed = splice(model, panel, HOOK, replace=replace, out_of_time=False)
    # the same stream, but a place from which the model cannot resume
    hooked = splice(model, panel, "layers.1:in", replace=replace, out_of_time=False)
    for name, logit in resumed.logits.items():
        np.testing.assert_allclose(hooked.logits[name], logit, rtol=1e-5, atol=1e-6)


def test_an_exact_reconstruction_changes_nothing(book, pca):
    folder, _, model = book
    dictionaries, mean = pca
    report = evaluate_fidelity(
        model, folder, HOOK, sae=dictionaries[D], mean=mean, config=EvaluateConfig(n_bootstrap=50), seed=0
    )
    assert report["mean_abs_dpd"] < 1e-6
    for name in ("spliced", "error_kept"):
        assert np.abs(list(report["change"][name].values())).max() < 1e-3
    assert report["change"]["zero"]["mean_abs_dpd"][0] > 1e-3


def test_the_report_against_scikit_learn(book, pca):
    folder, panel, model = book
    dictionaries, mean = pca
    config = EvaluateConfig(segments={"audit_sex": (), "x": (0.0,)}, n_bootstrap=50)
    sae = dictionaries[2]
    report = evaluate_fidelity(model, folder, HOOK, sae=sae, mean=mean, config=config, seed=0)
    # no NaN, which is no JSON
    json.dumps(report, allow_nan=False)
    for late, figures in ((False, report), (True, report["out_of_time"])):
        plain = one_by_one(panel, model, lambda x: None, late)
        spliced = one_by_one(panel, model, lambda x: sae.decode(sae.encode(x[0]))[None], late)
        rows = np.array(sorted(plain))
        p, q = ([made[r] for r in rows] for made in (plain, spliced))
        truth = panel.outcome[rows]
        assert figures["model"]["auc"] == pytest.approx(roc_auc_score(truth, p), abs=1e-4)
        assert figures["spliced"]["auc"] == pytest.approx(roc_auc_score(truth, q), abs=1e-4)
        value, low, high = figures["auc_change"]
        assert value == pytest.approx(roc_auc_score(truth, q) - roc_auc_score(truth, p), abs=1e-4)
        assert low <= value <= high
        for parts in (figures["segments"]["audit_sex"], figures["segments"]["x"], figures["periods"]):
            assert sum(part["rows"] for part in parts) == len(rows)
        assert {part["value"] for part in figures["segments"]["audit_sex"]} == {"f", "m"}
        first = figures["periods"][0]
        here = panel.time[rows] == first["from"]
        assert first["rows"] == here.sum()
        low_x = panel.values[rows, 0] < 0
        segment = figures["segments"]["x"][0]
        assert segment["model"]["auc"] == pytest.approx(
            roc_auc_score(truth[low_x], np.array(p)[low_x]), abs=1e-4
        )
    assert min(p["from"] for p in report["out_of_time"]["periods"]) == CUT
    assert ("reference_auc" in report) == (panel.outcome_per == "entity")


def test_edges_rise():
    with pytest.raises(ValueError, match="do not increase"):
        EvaluateConfig(segments={"x": (1.0, 0.5)})
