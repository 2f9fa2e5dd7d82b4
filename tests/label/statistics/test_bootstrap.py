"""Entity bootstrap against explicit resampling and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from label.confirm import Confirm, Detector, resampled
from label.statistics.bootstrap import ap_draws, entity_weights, interval
from label.targets import Target
from tests.label.builders import make_evidence, make_rows, peak, yes_no


def setup(seed=0, n_entities=30, length=7):
    rng = np.random.default_rng(seed)
    rows = make_rows(n_entities, length, "confirm")
    truth = rng.random(len(rows)) < 0.3
    value = np.where(rng.random(len(rows)) < 0.5, 0, np.round(rng.gamma(1, 1, len(rows)) + truth, 1)).astype(
        np.float32
    )
    known = rng.random(len(rows)) < 0.9
    weights = entity_weights(n_entities, 40, seed=seed)
    evidence = make_evidence(value[:, None], rows)
    confirm = Confirm(rows, {"c": yes_no("c", truth, known)}, weights)
    return rows, truth, value, known, weights, evidence, confirm


def test_weights_are_multinomial_counts():
    weights = entity_weights(50, 200, seed=1)
    assert (weights.sum(0) == 50).all()
    assert weights.mean() == pytest.approx(1.0)
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.1)


def test_sums_are_those_of_the_entities_drawn(monkeypatch):
    monkeypatch.setattr("label.confirm._ENTITIES", 7)
    rng = np.random.default_rng(2)
    weights = entity_weights(300, 50, seed=2)
    sums = rng.integers(0, 9, (2, 300)) * (rng.random(300) < 0.2)
    drawn = [
        [sum(int(w) * int(x) for w, x in zip(column, s, strict=True)) for column in weights.T] for s in sums
    ]
    np.testing.assert_array_equal(resampled(weights, *sums.astype(float)), drawn)
    assert not resampled(weights, np.zeros(300)).any()


def test_a_detector_on_few_entities_takes_the_weights_of_these_alone():
    weights = entity_weights(4000, 200, seed=3)
    assert weights.itemsize == 1
    few = np.zeros(4000)
    few[:40] = 2.0
    assert peak(lambda: resampled(weights, few, few)) < weights.nbytes / 2


@pytest.mark.parametrize("seed", range(3))
def test_every_draw_equals_sklearn_on_the_resampled_rows(seed):
    rows, truth, value, known, weights, evidence, confirm = setup(seed)
    measure = confirm.measure(Detector(*evidence.of(0), threshold=0.7), Target("c", 1, 1))
    p = truth[known].mean()
    assert measure.ap.value == pytest.approx(average_precision_score(truth[known], value[known]), abs=1e-6)
    assert measure.f1.value == pytest.approx(f1_score(truth[known], value[known] > np.float32(0.7)), abs=1e-9)
    assert measure.skill.value == pytest.approx((measure.ap.value - p) / (1 - p))
    for b in range(weights.shape[1]):
        weight = weights[rows.member, b]
        ap = average_precision_score(truth[known], value[known], sample_weight=weight[known])
        share = np.average(truth[known], weights=weight[known])
        assert measure.skill_draws[b] == pytest.approx((ap - share) / (1 - share), abs=1e-5)


def test_support_counts_entities_not_rows():
    rows, truth, value, known, _, evidence, confirm = setup()
    measure = confirm.measure(Detector(*evidence.of(0), threshold=0.7), Target("c", 1, 1))
    assert measure.n_entities == len(np.unique(rows.member[truth & known]))
    assert measure.n_entities_without == len(np.unique(rows.member[~truth & known]))
    assert measure.n_entities_firing == len(np.unique(rows.member[(value > np.float32(0.7)) & known]))


def test_a_detector_that_never_fires_has_the_skill_of_chance():
    empty = np.empty(0)
    out = ap_draws(
        empty,
        empty.astype(int),
        empty.astype(bool),
        np.array([3.0]),
        np.array([10.0]),
        np.ones((4, 1), np.uint8),
    )
    assert out[0] == pytest.approx(0.3)


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        x = rng.normal(size=40)
        weights = entity_weights(40, 300, seed=trial)
        found = interval(float(x.mean()), x @ weights / 40)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99
