"""The entity-clustered test: calibrated where rows of an entity depend on each other, where a chi-square is not."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency, false_discovery_control

from label.confirm import Confirm, calibrate
from label.discover import Pair
from label.statistics.bootstrap import entity_weights
from label.statistics.score_test import EntitySums, benjamini_hochberg, calibration, p_value, score_statistic
from label.targets import Target, permute_trajectories
from tests.label.builders import make_evidence, make_rows, yes_no


def persistent(rng, n_entities, length, prevalence, stay):
    out = np.empty((n_entities, length), dtype=bool)
    fresh = rng.random((n_entities, length)) < prevalence
    keep = rng.random((n_entities, length)) < stay
    out[:, 0] = fresh[:, 0]
    for t in range(1, length):
        out[:, t] = np.where(keep[:, t], out[:, t - 1], fresh[:, t])
    return out.ravel()


def sums_of(rows, fires, truth):
    def per(mask):
        return np.bincount(rows.member[mask], minlength=rows.n_entities).astype(float)

    return EntitySums(per(fires & truth), per(fires), per(truth), per(np.ones(len(rows), bool)))


def test_independent_persistent_signals_are_rejected_at_the_level_and_a_chi_square_rejects_many_more():
    rng = np.random.default_rng(0)
    rows = make_rows(300, 24)
    clustered, naive = [], []
    for _ in range(200):
        a, b = (persistent(rng, 300, 24, 0.2, 0.9) for _ in range(2))
        clustered.append(p_value(np.array([score_statistic(sums_of(rows, a, b))]))[0])
        table = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
        naive.append(chi2_contingency(table, correction=False).pvalue)
    assert (np.array(clustered) < 0.05).mean() <= 0.10
    assert (np.array(naive) < 0.05).mean() >= 0.3


def test_the_sign_is_that_of_the_association():
    rng = np.random.default_rng(1)
    rows = make_rows(200, 10)
    truth = rng.random(len(rows)) < 0.3
    assert score_statistic(sums_of(rows, truth, truth)) > 5
    assert score_statistic(sums_of(rows, ~truth, truth)) < -5
    assert score_statistic(sums_of(rows, np.zeros(len(rows), bool), truth)) == 0


def test_benjamini_hochberg_equals_scipy():
    rng = np.random.default_rng(2)
    p = np.concatenate([rng.random(50), rng.random(10) * 1e-4])
    assert benjamini_hochberg(p) == pytest.approx(false_discovery_control(p))


def test_inflation_widens_and_never_narrows():
    assert p_value(np.array([3.0]), 2.0) > p_value(np.array([3.0]), 1.0)
    assert p_value(np.array([3.0]), 0.5) == p_value(np.array([3.0]), 1.0)
    wide = calibration(np.random.default_rng(0).normal(scale=2, size=5000))
    assert wide.inflation == pytest.approx(4, rel=0.15)
    assert calibration(np.random.default_rng(0).normal(scale=0.5, size=500)).inflation == 1
    assert wide.rejected > 0.15


def test_permuting_trajectories_keeps_time_and_whole_entities():
    rng = np.random.default_rng(3)
    rows = make_rows(50, 6)
    source = permute_trajectories(rows, rng)
    assert (source >= 0).all()
    assert (rows.time[source] == rows.time).all()
    # one donor per entity, and no entity gives twice
    donors = rows.member[source].reshape(50, 6)
    assert (donors == donors[:, :1]).all()
    assert sorted(donors[:, 0]) == list(range(50))


def test_calibration_of_the_run_is_near_the_level_although_the_concept_is_real():
    rng = np.random.default_rng(4)
    rows = make_rows(300, 12, "confirm")
    truth = persistent(rng, 300, 12, 0.3, 0.8)
    dense = (truth * rng.random(len(rows))).astype(np.float32)[:, None]
    evidence = make_evidence(dense, rows)
    confirm = Confirm(rows, {"c": yes_no("c", truth)}, entity_weights(300, 50, seed=0))
    pair = Pair(0, Target("c", 1, 1), 0.1, 1.0, 1.0, 1.0, 0)
    found = calibrate(confirm, evidence, [pair], n_permutations=300, n_pairs=1, seed=0)
    assert found.n == 300
    assert 0.01 <= found.rejected <= 0.10
