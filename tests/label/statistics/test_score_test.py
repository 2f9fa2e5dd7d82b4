"""The entity-clustered test: calibrated where rows of an entity depend on each other, where a chi-square is not."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency, false_discovery_control, norm
from scipy.stats import t as student

from label.statistics.score_test import (
    EntitySums,
    Null,
    benjamini_hochberg,
    calibration,
    p_values,
    score_statistic,
)
from label.targets import permute_trajectories
from tests.label.builders import make_rows


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
        clustered.append(norm.sf(score_statistic(sums_of(rows, a, b))))
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


def test_rounding_is_not_an_association():
    # a concept of the calendar alone and a feature of the entity alone: no entity adds anything
    rows = make_rows(997, 6)
    for fires in (rows.member % 3 == 0, rows.member % 7 < 2):
        assert score_statistic(sums_of(rows, fires, rows.time == 3)) == 0
        assert score_statistic(sums_of(rows, rows.time > 3, fires)) == 0


def test_benjamini_hochberg_equals_scipy():
    rng = np.random.default_rng(2)
    p = np.concatenate([rng.random(50), rng.random(10) * 1e-4])
    assert benjamini_hochberg(p) == pytest.approx(false_discovery_control(p))


def test_a_statistic_is_held_against_the_permutations_of_its_own_pair():
    rng = np.random.default_rng(5)
    x = rng.normal([0, 6, 0, -4, 0, 0], [1, 1, 3, 1, 0, 1], (200, 6))
    # rare features: now and then nothing coincides, which is far to the left
    x[:, 5] = np.where(x[:, 5] > 0, x[:, 5], 6 * x[:, 5])
    null = Null(x, np.ones(6))
    p = p_values(np.full(6, 7.0), null)
    assert p[0] < 1e-8
    assert p[1] == pytest.approx(student.sf(1, 160), abs=0.05)
    assert p[2] == pytest.approx(student.sf(7 / 3, 160), abs=0.01)
    # a null below 0, or none to speak of, makes nothing more significant than the plain test does
    assert (p >= norm.sf(7.0)).all()
    assert p[3] == norm.sf(7.0)
    assert p[5] < 0.25 * student.sf((7 - x[:, 5].mean()) / x[:, 5].std(), 160)
    # on a quarter of the rows the null is half of what it is on all
    quarter = Null(null.statistics, np.full(6, 0.25))
    assert quarter.center == pytest.approx(np.where(null.center > 0, 2, 1) * null.center)
    assert p_values(np.full(6, 7.0), quarter)[1] > 0.99


@pytest.mark.parametrize("m", [20, 200])
@pytest.mark.parametrize("low", [-2, 0])
def test_p_values_are_uniform_where_nothing_is_to_be_found(m, low):
    rng = np.random.default_rng(6)
    shift, scale = rng.uniform(low, low + 4, 40_000), rng.uniform(1.5, 3, 40_000)
    null = Null(rng.normal(shift, scale, (m, 40_000)), np.ones(40_000))
    p = p_values(rng.normal(shift, scale), null)
    for level in (0.05, 0.01, 0.001):
        assert (p < level).mean() < 1.25 * level
        assert (p < level).mean() > 0.6 * level or low < 0


def test_inflation_widens_and_never_narrows():
    rng = np.random.default_rng(0)
    null = Null(rng.normal(size=(50, 40)), np.ones(40))
    z = np.full(40, 3.0)
    assert (p_values(z, null, 2.0) > p_values(z, null)).all()
    assert (p_values(z, null, 0.5) == p_values(z, null)).all()


def test_the_calibration_leaves_each_permutation_out_of_its_own_null():
    rng = np.random.default_rng(0)
    x = rng.normal(rng.normal(0, 4, 300).clip(0), 1.5, (60, 300))
    found = calibration(Null(x, np.ones(300)))
    by_hand = [p_values(x[b], Null(np.delete(x, b, axis=0), np.ones(300))) < 0.05 for b in range(len(x))]
    assert found.rejected == pytest.approx(np.mean(by_hand))
    assert found.n == x.size
    assert 0.045 < found.rejected < 0.055
    assert found.inflation == pytest.approx(1, abs=0.05)
    assert found.plain == pytest.approx(np.mean(x > norm.isf(0.05)))
    heavy = calibration(Null(rng.standard_t(2, (200, 300)), np.ones(300)))
    assert heavy.inflation > 1.1
    assert np.isnan(calibration(Null(np.zeros((10, 3)), np.ones(3))).rejected)


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
