"""Screening against scikit-learn and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from label.evidence import N_LEVELS
from label.statistics.counts import Levels, average_precision, count, fit_ranges, supported_ranges
from tests.label.builders import make_evidence, make_rows, peak


def draw(seed: int, n_entities: int = 40, length: int = 8, d: int = 6, ties: bool = False):
    rng = np.random.default_rng(seed)
    rows = make_rows(n_entities, length)
    dense = rng.gamma(1.0, 1.0, (len(rows), d)) * (rng.random((len(rows), d)) < rng.uniform(0.05, 0.9, d))
    if ties:
        dense = np.ceil(dense * 2) / 2
    codes = rng.integers(-1, 2, len(rows)).astype(np.int8)
    return rows, dense.astype(np.float32), codes


def fit_all(levels: Levels, codes: np.ndarray, *, n_bins: int):
    """Fit with every range on enough entities."""
    return fit_ranges(count(levels, codes, n_bins), np.ones((n_bins, n_bins), dtype=bool), numeric=n_bins > 2)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_equals_sklearn_on_the_rows_where_the_concept_applies(seed, ties):
    rows, dense, codes = draw(seed, ties=ties)
    fit = fit_all(Levels.of(make_evidence(dense, rows)), codes, n_bins=2)
    known = codes >= 0
    for j in range(dense.shape[1]):
        assert fit.auroc[j] == pytest.approx(roc_auc_score(codes[known], dense[known, j]), abs=1e-7)


def test_few_values_make_the_levels_exact_and_ap_equals_sklearn():
    rng = np.random.default_rng(0)
    rows, dense, codes = draw(1)
    dense = rng.integers(0, 8, dense.shape).astype(np.float32)
    fit = fit_all(Levels.of(make_evidence(dense, rows)), codes, n_bins=2)
    known = codes >= 0
    p = codes[known].mean()
    for j in range(dense.shape[1]):
        ap = average_precision_score(codes[known], dense[known, j])
        assert fit.skill[j] == pytest.approx((ap - p) / (1 - p), abs=1e-6)


def test_f1_is_the_best_over_the_frozen_thresholds_with_strict_comparison():
    rows, dense, codes = draw(2)
    levels = Levels.of(make_evidence(dense, rows))
    fit = fit_all(levels, codes, n_bins=2)
    known = codes >= 0
    truth = codes[known] == 1
    for j in range(dense.shape[1]):
        scores = []
        for threshold in levels.thresholds[j]:
            fires = dense[known, j] > threshold
            scores.append(2 * (fires & truth).sum() / max(fires.sum() + truth.sum(), 1))
        assert fit.f1[j] == pytest.approx(max(scores), abs=1e-6)
        fires = dense[known, j] > levels.thresholds[j, fit.level[j]]
        assert 2 * (fires & truth).sum() / (fires.sum() + truth.sum()) == pytest.approx(max(scores), abs=1e-6)


def test_a_numeric_concept_finds_the_interval_that_a_feature_stands_for():
    rng = np.random.default_rng(3)
    rows = make_rows(200, 10)
    codes = rng.integers(0, 10, len(rows)).astype(np.int8)
    dense = np.stack([np.isin(codes, [4, 5, 6]), codes >= 8, codes == 0], axis=1).astype(np.float32)
    fit = fit_all(Levels.of(make_evidence(dense, rows)), codes, n_bins=10)
    assert list(zip(fit.low, fit.high, strict=True)) == [(4, 6), (8, 9), (0, 0)]
    assert fit.skill == pytest.approx(np.ones(3), abs=1e-6)


def test_range_measures_equal_those_of_the_union_counted_directly():
    rng = np.random.default_rng(4)
    rows, dense, _ = draw(5)
    codes = rng.integers(-1, 5, len(rows)).astype(np.int8)
    fit = fit_all(Levels.of(make_evidence(dense, rows)), codes, n_bins=5)
    known = codes >= 0
    for j in range(dense.shape[1]):
        truth = ((codes >= fit.low[j]) & (codes <= fit.high[j]))[known]
        assert fit.auroc[j] == pytest.approx(roc_auc_score(truth, dense[known, j]), abs=1e-7)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_support_counts_the_entities_on_either_side_of_every_range(seed):
    rng = np.random.default_rng(seed)
    rows = make_rows(25, 3)
    n_bins, least = 4, int(rng.integers(1, 12))
    codes = rng.choice([-1, 0, 1, 2, 3], len(rows), p=[0.2, 0.5, 0.2, 0.08, 0.02]).astype(np.int8)
    supported = supported_ranges(rows, codes, n_bins=n_bins, min_entities=least)
    for low in range(n_bins):
        for high in range(low, n_bins):
            holds = {e for e, c in zip(rows.entity, codes, strict=True) if low <= c <= high}
            fails = {e for e, c in zip(rows.entity, codes, strict=True) if c >= 0 and not low <= c <= high}
            assert supported[low, high] == (min(len(holds), len(fails)) >= least)


def test_a_bin_of_few_entities_does_not_win_and_may_be_part_of_a_range():
    rows = make_rows(200, 5)
    codes = (np.arange(len(rows)) % 3).astype(np.int8)
    codes[:10] = 3  # two entities, on which the feature is perfect
    dense = np.stack([codes == 3, codes >= 2], axis=1).astype(np.float32)
    levels = Levels.of(make_evidence(dense, rows))
    supported = supported_ranges(rows, codes, n_bins=4, min_entities=30)
    fit = fit_ranges(count(levels, codes, 4), supported, numeric=True)
    assert fit_all(levels, codes, n_bins=4).low[0] == 3
    assert (fit.low[1], fit.high[1]) == (2, 3)
    assert fit.skill[1] == pytest.approx(1, abs=1e-6)
    assert not (fit.low[0] == 3 and fit.high[0] == 3)
    assert fit.skill[0] < 0.1


def test_a_concept_on_too_few_entities_has_no_skill():
    rows, dense, _ = draw(8)
    codes = (rows.entity < 5).astype(np.int8)
    supported = supported_ranges(rows, codes, n_bins=2, min_entities=30)
    fit = fit_ranges(count(Levels.of(make_evidence(dense, rows)), codes, 2), supported, numeric=False)
    assert np.isneginf(fit.skill).all()


def test_a_concept_that_holds_nowhere_or_everywhere_is_never_chosen():
    rows, dense, _ = draw(6)
    levels = Levels.of(make_evidence(dense, rows))
    for value in (0, 1):
        fit = fit_all(levels, np.full(len(rows), value, dtype=np.int8), n_bins=2)
        assert np.isneginf(fit.skill).all()


@pytest.mark.parametrize("silent", ["every feature", "the concept"])
def test_where_nothing_fires_there_is_no_skill_and_no_failure(silent):
    rows, dense, codes = draw(8)
    if silent == "every feature":
        dense[:] = 0
    else:
        # it applies on rows alone where nothing fires
        codes = np.where(dense.any(1), -1, codes).astype(np.int8)
    fit = fit_all(Levels.of(make_evidence(dense, rows)), codes, n_bins=2)
    assert not (fit.skill > 1e-6).any()


def test_a_silent_feature_has_the_skill_of_chance():
    rows, dense, codes = draw(7)
    dense[:, 0] = 0
    fit = fit_all(Levels.of(make_evidence(dense, rows)), codes, n_bins=2)
    assert fit.skill[0] == pytest.approx(0, abs=1e-6)
    assert fit.auroc[0] == pytest.approx(0.5)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_levels_place_every_value_strictly_above_its_threshold(seed):
    rows, dense, _ = draw(seed, n_entities=10, ties=True)
    evidence = make_evidence(dense, rows)
    levels = Levels.of(evidence)
    owner = np.repeat(np.arange(dense.shape[1]), (dense > 0).sum(0))
    for entry in range(len(evidence.value)):
        j, level = owner[entry], levels.level[entry]
        assert evidence.value[entry] > levels.thresholds[j, level]
        higher = levels.thresholds[j, level + 1 :]
        assert not (evidence.value[entry] > higher).any()
    assert levels.thresholds.shape == (dense.shape[1], N_LEVELS)


@pytest.mark.parametrize("block", [1, 1000, 1 << 30])
@pytest.mark.parametrize("ties", [False, True])
def test_counts_equal_those_of_dense_ranks_however_features_are_divided(block, ties, monkeypatch):
    monkeypatch.setattr("label.statistics.counts._BLOCK", block)
    rows, dense, _ = draw(9, d=12, ties=ties)
    dense[:, [0, 5, 11]] = 0
    codes = np.random.default_rng(9).integers(-1, 4, len(rows)).astype(np.int8)
    levels = Levels.of(make_evidence(dense, rows))
    counts = count(levels, codes, 4)
    known = codes >= 0
    upto = codes[known, None] < np.arange(5)
    np.testing.assert_array_equal(counts.total, upto.sum(0))
    for j in range(12):
        above = dense[known, j, None] > levels.thresholds[j]
        np.testing.assert_array_equal(counts.above[j], (above[:, :, None] & upto[:, None]).sum(0))
        np.testing.assert_array_equal(counts.rank_sum[j], rankdata(dense[known, j]) @ upto)


def test_counting_holds_little_beside_the_entries(monkeypatch):
    monkeypatch.setattr("label.statistics.counts._BLOCK", 1 << 12)
    rows = make_rows(500, 8)
    levels = Levels.of(make_evidence(np.random.default_rng(10).random((4000, 60)).astype(np.float32), rows))
    assert levels.level.itemsize == 1
    assert peak(lambda: count(levels, (rows.time % 2).astype(np.int8), 2)) < 10 * len(levels.level)


def test_average_precision_of_a_single_threshold_is_recall_weighted():
    # 3 of 4 fired rows are positive, of 5 positives among 20 rows
    ap = average_precision(np.array([[3.0]]), np.array([[4.0]]), np.array([5]), 20)
    assert ap[0] == pytest.approx(0.6 * 0.75 + 0.4 * 0.25)
