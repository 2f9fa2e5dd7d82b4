"""The reference model only sees the past, survives saving, and learns what can be learned."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from activations_cache.batching import batches_by_length
from activations_cache.panel import Panel, PanelConfig
from activations_cache.prepare import prepare
from activations_cache.reference.baseline import boosted_probabilities
from activations_cache.reference.columns import knots_of, model_config
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.reference.fit import fit
from activations_cache.reference.histories import collate
from activations_cache.reference.predict import evaluate, predict
from activations_cache.reference.scores import auc, auc_difference, discrimination
from activations_cache.reference.shape import FitConfig, ModelShape, reinitialised
from sae.errors import ConfigError

SHAPE = ModelShape(d_model=32, n_layers=2, n_heads=2, d_ff=64, dropout=0.0)
CPU = torch.device("cpu")


def make_panel(folder: Path, n: int = 1500, seed: int = 0, **changes) -> Panel:
    """Irregular histories; the outcome depends on the last two values of x."""
    rng = np.random.default_rng(seed)
    ids, times, x, z, y = [], [], [], [], []
    for i in range(n):
        t = np.sort(rng.permutation(10)[: rng.integers(2, 9)])
        v = rng.normal(size=len(t))
        outcome = rng.random() < 1 / (1 + np.exp(-2 * (v[-1] + v[-2])))
        ids += [f"E{i:04d}"] * len(t)
        times += t.tolist()
        x += v.tolist()
        z += np.where(rng.random(len(t)) < 0.2, np.nan, rng.lognormal(3, 2, len(t))).tolist()
        y += [int(outcome)] * len(t)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids, "t": times, "x": x, "z": z, "y": y}), folder / "raw.parquet")
    settings = {"entity": "id", "time": "t", "columns": {"x": "x", "z": "z"}, "outcome": "y"} | changes
    prepare(PanelConfig(path=str(folder / "raw.parquet"), **settings), folder)
    return Panel.open(folder)


@pytest.fixture(scope="module")
def panel(tmp_path_factory) -> Panel:
    return make_panel(tmp_path_factory.mktemp("panel"))


@pytest.fixture(scope="module")
def model(panel) -> CreditTransformer:
    torch.manual_seed(0)
    dims = SHAPE.model_dump(exclude={"kind", "n_knots"})
    rows = np.ones(len(panel.time), dtype=bool)
    return CreditTransformer(model_config(panel, rows, n_knots=8, shape=dims)).eval()


def test_changing_the_future_changes_nothing_before_it(panel, model):
    histories = collate(panel, np.arange(32))
    with torch.inference_mode():
        before = model(histories.values, histories.gap)
        for cut in range(1, histories.values.shape[1]):
            values, gap = histories.values.clone(), histories.gap.clone()
            values[:, cut:] = torch.randn_like(values[:, cut:]) * 1e3
            gap[:, cut:] = 7
            after = model(values, gap)
            assert torch.equal(before.default_logit[:, :cut], after.default_logit[:, :cut])
            assert torch.equal(before.next_columns[:, :cut], after.next_columns[:, :cut])
            assert not torch.equal(before.default_logit[:, cut], after.default_logit[:, cut])


def test_padding_does_not_matter(panel, model):
    codes = np.arange(24)
    together = collate(panel, codes)
    with torch.inference_mode():
        batch = model(together.values, together.gap).default_logit
        for i in codes:
            alone = collate(panel, np.array([i]))
            logit = model(alone.values, alone.gap).default_logit[0]
            torch.testing.assert_close(batch[i, : len(logit)], logit, rtol=1e-4, atol=1e-5)


def test_resuming_behind_any_layer_gives_the_same(panel, model):
    from activations_cache.hooks import capture

    histories = collate(panel, np.arange(16))
    with torch.inference_mode(), capture(model, ["embedding", "layers.0", "layers.1"]) as seen:
        whole = model(histories.values, histories.gap)
        for hook, stream in seen.items():
            layer = model.resume_after(hook)
            assert torch.equal(model.resume(layer, stream).default_logit, whole.default_logit)
    assert model.resume_after("norm") is None


def test_saving_and_loading_keeps_every_bit(panel, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = CreditTransformer.from_pretrained(tmp_path).eval()
    histories = collate(panel, np.arange(16))
    with torch.inference_mode():
        a, b = (m(histories.values, histories.gap).default_logit for m in (model, again))
    assert torch.equal(a, b)


def test_missing_is_not_zero(panel, model):
    histories = collate(panel, np.array([0]))
    zero, missing = histories.values.clone(), histories.values.clone()
    zero[..., 1], missing[..., 1] = 0.0, float("nan")
    with torch.inference_mode():
        a, b = (model(v, histories.gap).default_logit for v in (zero, missing))
    assert not torch.allclose(a, b)


def test_gaps_are_told_apart(panel, model):
    histories = collate(panel, np.array([0]))
    with torch.inference_mode():
        a = model(histories.values, histories.gap).default_logit
        b = model(histories.values, histories.gap + 3).default_logit
    assert not torch.allclose(a, b)


def test_collate_counts_gaps_and_keeps_rows(panel):
    histories = collate(panel, np.array([3, 5]))
    for i, code in enumerate((3, 5)):
        rows = np.arange(panel.offsets[code], panel.offsets[code + 1])
        assert histories.rows[i, : len(rows)].tolist() == rows.tolist()
        assert histories.gap[i, 0] == 0
        assert histories.gap[i, 1 : len(rows)].tolist() == (np.diff(panel.time[rows]) - 1).tolist()
        assert histories.real[i].sum() == len(rows)


def test_batches_hold_every_entity_once_and_little_padding(panel):
    codes = np.arange(panel.n_entities)
    batches = list(batches_by_length(panel, codes, 256))
    assert sorted(np.concatenate(batches).tolist()) == codes.tolist()
    length = np.diff(panel.offsets)
    for batch in batches:
        assert length[batch].max() * len(batch) <= 256 or len(batch) == 1


@pytest.fixture(scope="module")
def fitted(panel, tmp_path_factory):
    config = FitConfig(epochs=10, batch_rows=256)
    return fit(panel, SHAPE, config, seed=0, device=CPU, work=tmp_path_factory.mktemp("work"))


def test_it_learns_what_depends_on_two_months(panel, fitted):
    found = evaluate(fitted[0], panel, "confirm")
    assert found.auc > 0.74
    assert evaluate(reinitialised(fitted[0], 1), panel, "confirm").auc < 0.7


def test_an_interrupted_fit_ends_with_the_same_bits(panel, fitted, tmp_path):
    config = FitConfig(epochs=10, batch_rows=256)

    def stop(progress):
        if progress.epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(panel, SHAPE, config, seed=0, device=CPU, work=tmp_path, report=stop)
    again, history = fit(panel, SHAPE, config, seed=0, device=CPU, work=tmp_path)
    assert history == fitted[1]
    for name, value in fitted[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_fit_that_diverges_says_so_and_keeps_nothing(panel, tmp_path):
    config = FitConfig(epochs=3, batch_rows=2048, lr=1e6)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"(?s)diverged.*loss (nan|inf) in epoch 1.*lower fit\.lr"):
            fit(panel, SHAPE, config, seed=0, device=CPU, work=tmp_path)
        assert not list(tmp_path.iterdir())


def test_the_twin_shares_the_input_tables_and_nothing_else(fitted):
    model, twin = fitted[0], reinitialised(fitted[0], 1)
    assert torch.equal(model.columns.knots, twin.columns.knots)
    assert not torch.allclose(model.columns.project.weight, twin.columns.project.weight)
    assert not torch.allclose(model.layers[0].qkv.weight, twin.layers[0].qkv.weight)


def test_outcomes_per_row_are_judged_on_every_known_row(tmp_path):
    panel = make_panel(tmp_path, n=400, outcome="CASE WHEN t > 2 THEN y END", outcome_per="row")
    model, _ = fit(panel, SHAPE, FitConfig(epochs=1), seed=0, device=CPU, work=tmp_path / "work")
    logits, truth, owner = predict(model, panel, panel.entities_of("confirm"))
    confirm = np.isin(panel.entity, panel.entities_of("confirm"))
    assert len(logits) == (confirm & np.isfinite(panel.outcome)).sum()
    assert len(owner) == len(truth)


def test_gradient_boosting_sees_the_same_rows(panel):
    codes = panel.entities_of("confirm")
    truth = panel.outcome[panel.offsets[codes]]
    assert auc(truth, boosted_probabilities(panel, codes, seed=0)) > 0.75


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 1.0], [0.0] * 90 + [1.0] * 10, list(range(1000)), [1e9, 1e9 + 1]]
)
def test_knots_rise_strictly_in_single_precision(values):
    knots = np.array(knots_of(np.array(values, dtype=float), 16), dtype=np.float32)
    assert len(knots) == 16
    assert (np.diff(knots) > 0).all()


def test_scores_equal_sklearn():
    from sklearn.metrics import brier_score_loss, roc_auc_score

    rng = np.random.default_rng(0)
    p = np.round(rng.random(500), 2)
    y = (rng.random(500) < p).astype(float)
    found = discrimination(y, p)
    assert found.auc == pytest.approx(roc_auc_score(y, p))
    assert found.brier == pytest.approx(brier_score_loss(y, p))
    from scipy.stats import ks_2samp

    assert found.ks == pytest.approx(ks_2samp(p[y == 1], p[y == 0]).statistic)
    value, low, high = auc_difference(y, p, rng.random(500), np.arange(500), n_bootstrap=100)
    assert low < value < high
    assert low > 0.1
