"""The best raw column by brute force, and unions of features."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from label.baselines import ColumnDetector, best_columns
from label.confirm import Confirm, Detector
from label.groups import Member, grow, measure_group
from label.statistics.bootstrap import entity_weights
from label.targets import Target, code_concept
from tests.label.builders import make_evidence, make_rows, peak, yes_no

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
    found = best_columns(["a", "b", "c"], x, {"c": yes_no("c", truth)}, [T])[T]
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
    found = best_columns(["x"], values["discover"][:, None], {"x": concept}, [target])
    confirm = Confirm(make_rows(1000, 12, "confirm"), {"x": concept}, entity_weights(1000, 50, seed=0))
    assert found[target].shape == "interval"
    assert confirm.measure(found[target].on(values["confirm"]), target).skill.value > 0.98


def test_skill_of_a_column_equals_sklearn_with_missing_values_last():
    x, _ = column_case("rising", seed=1)
    noisy = x[:, 1] + 0.5 * np.random.default_rng(2).normal(size=2000) > 1
    found = best_columns(["b"], x[:, 1:2], {"c": yes_no("c", noisy)}, [T])[T]
    p = noisy.mean()
    ap = average_precision_score(noisy, np.where(np.isnan(x[:, 1]), -1e9, x[:, 1]))
    assert found.shape == "rising"
    assert found.skill == pytest.approx((ap - p) / (1 - p), abs=1e-6)


def test_rows_where_the_concept_does_not_apply_do_not_count():
    x, truth = column_case("rising", seed=3)
    applies = np.random.default_rng(4).random(2000) < 0.5
    one = best_columns(["b"], x[:, 1:2], {"c": yes_no("c", truth, applies)}, [T])[T]
    two = best_columns(["b"], x[applies, 1:2], {"c": yes_no("c", truth[applies])}, [T])[T]
    assert one.skill == pytest.approx(two.skill)


def skill(truth, score):
    p = truth.mean()
    return (average_precision_score(truth, score) - p) / (1 - p)


def scores_of(column):
    """Every reading of a column of few distinct values, but nearness: a score on every row."""
    lowest = np.where(np.isnan(column), -1e9, 0)
    filled = np.nan_to_num(column)
    yield filled + lowest
    yield -filled + lowest
    yield np.isnan(column).astype(float)
    for low in np.unique(filled):
        yield from ((column >= low) & (column <= high) for high in np.unique(filled) if high >= low)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_shape_of_the_best_column_is_found_and_has_the_skill_it_says(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, (150, 3)).astype(float)
    x[rng.random((150, 3)) < 0.2] = np.nan
    applies = rng.random(150) < 0.9
    parts = [x[:, 0] > 3, x[:, 1] < 2, np.abs(x[:, 2] - 2) < 2, np.isnan(x[:, 0])]
    for truth in (part ^ (rng.random(150) < 0.1 * seed) for part in parts):
        found = best_columns(["a", "b", "c"], x, {"c": yes_no("c", truth, applies)}, [T])[T]
        column = x[:, "abc".index(found.column)]
        detector, score = found.on(column), np.full(150, -1e9)
        score[detector.row] = detector.value
        assert found.skill == pytest.approx(skill(truth[applies], score[applies]))
        best = max(skill(truth[applies], s[applies]) for i in range(3) for s in scores_of(x[:, i]))
        assert found.skill == pytest.approx(best) if found.shape != "near" else found.skill > best


def test_a_concept_that_is_the_absence_of_a_value_is_found_by_the_column():
    rng = np.random.default_rng(0)
    values = {s: np.where(rng.random(1200) < 0.1, np.nan, rng.random(1200)) for s in ("discover", "confirm")}
    absent = {s: np.isnan(v) for s, v in values.items()}
    concept = code_concept("c", "concept", absent, {s: np.ones(1200, bool) for s in absent}, numeric=False)
    columns = np.stack([rng.random(1200), values["discover"]], axis=1)
    found = best_columns(["income", "score"], columns, {"c": concept}, [T])[T]
    assert found.describe() == "missing score"
    confirm = Confirm(make_rows(100, 12, "confirm"), {"c": concept}, entity_weights(100, 50, seed=0))
    assert confirm.measure(found.on(values["confirm"]), T).skill.value == pytest.approx(1.0)


def test_a_feature_that_grades_a_column_does_not_exceed_it():
    """A concept that goes with a column, and is not it: rows in the middle of the interval are surer than at its ends."""
    rng = np.random.default_rng(0)
    values = {s: rng.normal(size=12_000) for s in ("discover", "confirm")}
    noisy = {s: v + 0.3 * rng.normal(size=12_000) for s, v in values.items()}
    known = {s: np.ones(12_000, bool) for s in values}
    concept = code_concept("c", "concept", noisy, known, numeric=True)
    target = Target("c", 5, 7)
    found = best_columns(["x"], values["discover"][:, None], {"c": concept}, [target])[target]
    confirm = Confirm(make_rows(1000, 12, "confirm"), {"c": concept}, entity_weights(1000, 50, seed=0))
    middle = np.median(values["discover"][concept.truth("discover", target)[0]])
    holds = concept.truth("confirm", target)[0]
    graded = skill(holds, -np.abs(values["confirm"] - middle))
    assert confirm.measure(found.on(values["confirm"]), target).skill.value > graded - 0.01
    assert found.describe().startswith("x near the middle of [")


def test_memory_for_columns_does_not_grow_with_targets():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 1))
    concepts = {f"c{i}": yes_no(f"c{i}", rng.random(20_000) < 0.05) for i in range(32)}
    targets = [Target(name, 1, 1) for name in concepts]
    assert peak(lambda: best_columns(["x"], x, concepts, targets)) < 200 * 20_000


def test_a_group_takes_the_features_that_tile_a_concept_and_stops():
    rng = np.random.default_rng(5)
    bins = rng.integers(0, 6, 3000)
    truth = np.isin(bins, [1, 2, 3])
    firing = np.stack([bins == b for b in range(6)] + [rng.random(3000) < 0.1])
    fires = [np.flatnonzero(f) for f in firing]
    chosen, f1 = grow(fires, truth, np.ones(3000, bool), max_size=8, min_gain=0.01)
    assert sorted(chosen) == [1, 2, 3]
    assert f1 == pytest.approx(1.0)
    assert len(grow(fires, truth, np.ones(3000, bool), max_size=2, min_gain=0.01)[0]) == 2


def test_a_group_never_takes_a_member_twice():
    fires = [np.arange(5), np.arange(3), np.arange(2, 4)]
    assert grow(fires, np.arange(10) < 5, np.ones(10, bool), max_size=8, min_gain=0.0) == ([0], 1.0)


@pytest.mark.parametrize("seed", range(10))
def test_every_step_of_a_group_takes_the_best_union(seed):
    rng = np.random.default_rng(seed)
    firing = rng.random((12, 200)) < rng.uniform(0, 0.3, (12, 1))
    truth, applies = rng.random(200) < 0.4, rng.random(200) < 0.8
    chosen, f1 = grow([np.flatnonzero(f) for f in firing], truth & applies, applies, max_size=8, min_gain=0.0)

    def score(members):
        return f1_score(truth[applies], firing[members].any(0)[applies])

    reached = [score(chosen[: i + 1]) for i in range(len(chosen))]
    for i, value in enumerate(reached):
        assert value == pytest.approx(max(score([*chosen[:i], j]) for j in range(12)))
    assert f1 == pytest.approx(reached[-1]) and (np.diff(reached) > 0).all()
    assert len(chosen) == 8 or max(score([*chosen, j]) for j in range(12)) <= f1 + 1e-12


def test_growing_holds_the_rows_on_which_candidates_fire_and_no_more():
    fires = [np.arange(j, 20_000, 64) for j in range(64)]
    holds, applies = np.arange(20_000) % 64 < 4, np.ones(20_000, bool)
    assert peak(lambda: grow(fires, holds, applies, max_size=8, min_gain=0.0)) < 40 * 20_000


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
