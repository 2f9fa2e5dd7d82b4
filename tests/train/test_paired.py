"""Changes between predictions, against scikit-learn, scipy and samples that are written out row by row."""

import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from activations_cache.reference.scores import discrimination
from train.paired import Scored, changes, figure, probability, recovered, resample


@pytest.fixture(scope="module")
def book():
    """1,200 rows of 300 entities, with ties, some outcomes unknown, and a worse prediction beside the model's."""
    rng = np.random.default_rng(0)
    entity = np.sort(rng.integers(0, 300, 1200))
    logit = np.round(rng.normal(-1, 1.5, 1200), 1)
    truth = (rng.random(1200) < 1 / (1 + np.exp(-logit))).astype(float)
    truth[rng.random(1200) < 0.05] = np.nan
    logits = {
        "model": logit,
        "spliced": np.round(logit + rng.normal(0.2, 0.7, 1200), 1),
        "zero": np.full(1200, -1.0),
    }
    return entity, truth, logits


def test_measures_of_weighted_rows_are_those_of_repeated_rows(book):
    _, truth, logits = book
    known = np.isfinite(truth)
    y, logit = truth[known], logits["spliced"][known]
    weight = np.random.default_rng(1).integers(0, 4, len(y))
    found = Scored(y, logit).measure(weight.astype(float))
    y, logit = np.repeat(y, weight), np.repeat(logit, weight)
    p = 1 / (1 + np.exp(-logit))
    assert found["auc"] == pytest.approx(roc_auc_score(y, p))
    assert found["gini"] == pytest.approx(2 * roc_auc_score(y, p) - 1)
    assert found["ks"] == pytest.approx(ks_2samp(p[y == 1], p[y == 0]).statistic)
    assert found["brier"] == pytest.approx(brier_score_loss(y, p))
    assert found["loss"] == pytest.approx(log_loss(y, p))


def test_calibration_error_is_that_of_ten_bins_and_of_one_bin_for_a_constant():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=503)
    y = (rng.random(503) < 0.4).astype(float)
    ones = np.ones(503)
    # ties are cut by neither
    for scores in (logit, np.round(logit, 1), np.zeros(503)):
        found = discrimination(y, probability(scores))
        assert Scored(y, scores).measure(ones)["calibration_error"] == pytest.approx(found.calibration_error)
        assert sum(b["n"] for b in found.calibration) == 503
    assert len(found.calibration) == 1
    constant = Scored(y, np.zeros(503)).measure(ones)
    assert constant["calibration_error"] == pytest.approx(abs(y.mean() - 0.5))
    assert (constant["auc"], constant["ks"]) == (0.5, 0.0)


def test_samples_are_of_whole_entities_and_the_same_for_all_predictions(book):
    entity, truth, logits = book
    samples = resample(truth, logits, entity, n_bootstrap=60, seed=3)
    rng = np.random.Generator(np.random.Philox(3))
    codes = np.unique(entity)
    for draw in range(1, 4):
        chosen = codes[rng.integers(0, len(codes), len(codes))]
        rows = np.concatenate([np.flatnonzero(entity == code) for code in chosen])
        known = rows[np.isfinite(truth[rows])]
        for name, logit in logits.items():
            assert samples[name]["auc"][draw] == pytest.approx(roc_auc_score(truth[known], logit[known]))
            moved = np.abs(1 / (1 + np.exp(-logit)) - 1 / (1 + np.exp(-logits["model"])))
            assert samples[name]["mean_abs_dpd"][draw] == pytest.approx(moved[rows].mean())


def test_changes_and_loss_recovered_against_their_formulas(book):
    entity, truth, logits = book
    samples = resample(truth, logits, entity, n_bootstrap=60, seed=3)
    known = np.isfinite(truth)
    auc = {name: roc_auc_score(truth[known], logit[known]) for name, logit in logits.items()}
    value, low, high = changes(samples, "spliced")["auc"]
    assert value == pytest.approx(auc["spliced"] - auc["model"])
    assert low < value < high < 0
    loss = {n: log_loss(truth[known], 1 / (1 + np.exp(-v[known]))) for n, v in logits.items()}
    value, low, high = recovered(samples, "spliced", "zero")
    assert value == pytest.approx((loss["zero"] - loss["spliced"]) / (loss["zero"] - loss["model"]))
    assert low < value < high
    assert recovered(samples, "model", "zero") == pytest.approx((1, 1, 1))
    assert recovered(samples, "spliced", "model") == (None, None, None)


def test_a_part_has_the_figures_of_its_rows(book):
    entity, truth, logits = book
    within = np.arange(1200) % 3 == 0
    samples = resample(truth, logits, entity, n_bootstrap=50, seed=0, within=within)
    rows = within & np.isfinite(truth)
    assert samples["spliced"]["auc"][0] == pytest.approx(roc_auc_score(truth[rows], logits["spliced"][rows]))
    whole = resample(truth, logits, entity, n_bootstrap=50, seed=0)
    assert np.std(samples["model"]["auc"]) > np.std(whole["model"]["auc"])


def test_with_one_outcome_there_is_no_discrimination_but_calibration(book):
    entity, _, logits = book
    samples = resample(np.zeros(1200), logits, entity, n_bootstrap=50, seed=0)
    found = changes(samples, "spliced")
    assert all(found[name] == (None, None, None) for name in ("auc", "gini", "ks"))
    shift = np.square(probability(logits["spliced"])).mean() - np.square(probability(logits["model"])).mean()
    assert found["brier"][0] == pytest.approx(shift)
    assert found["calibration_error"][0] > 0 and found["loss"][0] > 0


def test_without_outcomes_only_distances_are_left(book):
    entity, _, logits = book
    samples = resample(np.full(1200, np.nan), logits, entity, n_bootstrap=50, seed=0)
    assert set(samples["spliced"]) == {"mean_abs_dpd"}


def test_what_is_not_defined_is_none():
    assert figure(np.array([np.nan, np.inf, np.nan])) == (None, None, None)
    assert probability(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]
