"""Thresholds tried per feature, and the numbers of times."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from label.evidence import N_LEVELS, rows_of
from label.statistics.counts import Levels, count, fit_ranges
from tests.label.builders import make_evidence, make_rows


@given(st.lists(st.integers(1, 100), min_size=1, max_size=64), st.booleans())
@settings(max_examples=40, deadline=None)
def test_of_64_rows_at_most_every_value_is_a_threshold(values, distinct):
    values = sorted(set(values)) if distinct else values
    dense = np.zeros((100, 1), np.float32)
    dense[: len(values), 0] = values
    thresholds = make_evidence(dense, make_rows(100, 1)).thresholds()[0]
    # the largest is of no use as one: nothing exceeds it
    assert set(values) - {max(values)} <= set(thresholds.tolist()) <= {0, *values}


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_thresholds_rise_from_0_and_are_values_of_their_feature(seed):
    rng = np.random.default_rng(seed)
    dense = np.round(rng.gamma(1, 1, (300, 4)), int(rng.integers(0, 4))).astype(np.float32)
    dense *= rng.random((300, 4)) < [0, 0.01, 0.5, 1]
    thresholds = make_evidence(dense, make_rows(300, 1)).thresholds()
    assert thresholds.shape == (4, N_LEVELS)
    assert (np.diff(thresholds, axis=1) >= 0).all() and (thresholds[:, 0] == 0).all()
    for j in range(4):
        assert set(thresholds[j].tolist()) <= {0, *dense[:, j].tolist()}


@pytest.mark.parametrize("prevalence", [0.002, 0.005, 0.02, 0.3])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_screen_sees_a_rare_concept_at_the_top_of_a_feature_that_fires_often(rate, prevalence):
    rng = np.random.default_rng(0)
    n = 20_000
    dense = (rng.exponential(size=n) * (rng.random(n) < rate)).astype(np.float32)[:, None]
    holds = np.argsort(np.argsort(-dense[:, 0] + rng.normal(size=n) * 0.2)) < n * prevalence
    levels = Levels.of(make_evidence(dense, make_rows(n, 1)))
    every = np.ones((2, 2), dtype=bool)
    skill = fit_ranges(count(levels, holds.astype(np.int8), 2), every, numeric=False).skill[0]
    exact = (average_precision_score(holds, dense[:, 0]) - prevalence) / (1 - prevalence)
    assert skill == pytest.approx(exact, abs=0.04)


def test_times_are_numbered_in_order_whatever_their_unit():
    time = np.array([7, 3, 3, -5, 7]) * 10**18
    rows, _ = rows_of("discover", np.array([0, 0, 1, 1, 2]), time, np.zeros(5, np.int64))
    np.testing.assert_array_equal(rows.period, [1, 2, 0, 1, 2])
