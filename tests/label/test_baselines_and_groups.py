"""The best raw column by brute force, and unions of features."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from label.baselines import ColumnDetector, best_columns
from label.confirm import Confirm, Detector
from label.groups import Member, grow, measure_group
from label.statistics.bootstrap import entity_weights
from label.targets import Target, code_concept
from tests.label.builders import make_evidence, make_rows, yes_no

T = Target("c", 1, 1)


def column_case(shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2000, 3)).astype(np.float32)
    x[rng.random(2000) < 0.1, 1] = np.nan
    truth = {"rising": x[:, 1] > 1, "falling": x[:, 1] < -1, "interval": (x[:, 1] > 0.2) & (x[:, 1] < 0.9)}[
        shape
    ]
    return x, truth


@pytest.mark.parametrize("shape", ["rising", "falling", "interval"])
def test_the_column_its_sign_and_its_interval_are_found(shape):
    x, truth = column_case(shape)
    found = best_columns(["a", "b", "c"], x, {T: (truth, np.ones(2000, bool))})[T]
    assert (found.column, found.shape) == ("b", shape)
    assert found.skill > 0.99


@pytest.mark.parametrize(("low", "high"), [(11, 11), (2, 2), (4, 4), (3, 5)])
def test_a_concept_that_is_a_column_is_found_by_it_on_other_rows(low, high):
    """Else a feature that restates the column would exceed it wherever a bin ends between its quantiles."""
    rng = np.random.default_rng(low)
    values = {s: rng.random(12_000) for s in ("discover", "confirm")}
    known = {s: np.ones(12_000, bool) for s in values}
    concept = code_concept("x", "concept", values, known, numeric=True)
    target = Target("x", low, high)
    found = best_columns(["x"], values["discover"][:, None], {target: concept.truth("discover", target)})
    confirm = Confirm(make_rows(1000, 12, "confirm"), {"x": concept}, entity_weights(1000, 50, seed=0))
    assert found[target].shape == "interval"
    assert confirm.measure(found[target].on(values["confirm"]), target).skill.value > 0.98


def test_skill_of_a_column_equals_sklearn_with_missing_values_last():
    x, truth = column_case("rising", seed=1)
    noisy = truth ^ (np.random.default_rng(2).random(2000) < 0.1)
    found = best_columns(["b"], x[:, 1:2], {T: (noisy, np.ones(2000, bool))})[T]
    p = noisy.mean()
    ap = average_precision_score(noisy, np.where(np.isnan(x[:, 1]), -1e9, x[:, 1]))
    assert found.shape == "rising"
    assert found.skill == pytest.approx((ap - p) / (1 - p), abs=1e-6)


def test_rows_where_the_concept_does_not_apply_do_not_count():
    x, truth = column_case("rising", seed=3)
    applies = np.random.default_rng(4).random(2000) < 0.5
    one = best_columns(["b"], x[:, 1:2], {T: (truth & applies, applies)})[T]
    two = best_columns(["b"], x[applies, 1:2], {T: (truth[applies], applies[applies])})[T]
    assert one.skill == pytest.approx(two.skill)


def test_a_group_takes_the_features_that_tile_a_concept_and_stops():
    rng = np.random.default_rng(5)
    bins = rng.integers(0, 6, 3000)
    truth = np.isin(bins, [1, 2, 3])
    firing = np.stack([bins == b for b in range(6)] + [rng.random(3000) < 0.1])
    chosen, f1 = grow(firing, truth, np.ones(3000, bool), max_size=8, min_gain=0.01)
    assert sorted(chosen) == [1, 2, 3]
    assert f1 == pytest.approx(1.0)
    assert len(grow(firing, truth, np.ones(3000, bool), max_size=2, min_gain=0.01)[0]) == 2


def test_a_group_never_takes_a_member_twice():
    firing = np.zeros((3, 10), bool)
    firing[0, :5] = firing[1, :3] = firing[2, 2:4] = True
    assert grow(firing, firing[0], np.ones(10, bool), max_size=8, min_gain=0.0) == ([0], 1.0)


def test_a_column_is_described_with_the_interval_that_it_has():
    detector = ColumnDetector("score", "interval", 10_001.2, 10_004.9, 0.5)
    assert detector.describe() == "score in [10001.2, 10004.9]"


def test_a_group_is_measured_as_the_union_at_frozen_thresholds():
    rng = np.random.default_rng(6)
    rows = make_rows(100, 12, "confirm")
    dense = (rng.random((1200, 2)) * (rng.random((1200, 2)) < 0.4)).astype(np.float32)
    truth = rng.random(1200) < 0.4
    confirm = Confirm(rows, {"c": yes_no("c", truth)}, entity_weights(100, 100, seed=0))
    members = [Member(0, 0.3), Member(1, 0.6)]
    found = measure_group(confirm, make_evidence(dense, rows), members, T)
    union = (dense[:, 0] > np.float32(0.3)) | (dense[:, 1] > np.float32(0.6))
    assert found.f1.value == pytest.approx(f1_score(truth, union))
    assert found.f1.low < found.f1.value < found.f1.high


def test_a_rate_that_is_not_defined_in_a_sample_does_not_count():
    """A detector that fires on one entity: half of the samples have none of its rows."""
    rows = make_rows(50, 4, "confirm")
    dense = np.zeros((200, 1), np.float32)
    dense[:4] = 1.0
    confirm = Confirm(rows, {"c": yes_no("c", dense[:, 0] > 0)}, entity_weights(50, 200, seed=0))
    found = measure_group(confirm, make_evidence(dense, rows), [Member(0, 0.5)], T)
    assert found.precision == (1.0, 1.0, 1.0) and found.recall == (1.0, 1.0, 1.0)
    single = confirm.measure(Detector(np.arange(4), np.ones(4, np.float32), 0.5), T)
    assert (single.f1, single.precision, single.recall) == (found.f1, found.precision, found.recall)
