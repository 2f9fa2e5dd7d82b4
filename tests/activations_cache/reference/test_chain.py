import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from activations_cache.reference.chain import (
    BUCKET,
    DEF,
    PUBLISHED,
    SHOCK_MAX,
    SHOCK_MIN,
    STATES,
    modulate,
    published_matrix,
    simulate_shocks,
    simulate_states,
    split_moves,
    start_mix,
    transition_matrix,
)
from activations_cache.reference.config import ReferenceConfig
from activations_cache.reference.macro import simulate_economy
from activations_cache.reference.simulate import simulate_block

START = {"TRN": 0.34, "REV": 0.36, "STR": 0.12, "DIS": 0.03, "HRD": 0.01, "DOR": 0.14}


def published_start() -> np.ndarray:
    return np.array([START.get(name, 0.0) for name in PUBLISHED])


@pytest.mark.parametrize(("month", "share"), [(6, 0.005), (12, 0.018), (24, 0.046), (36, 0.076), (48, 0.105)])
def test_the_published_chain_defaults_as_published(month: int, share: float) -> None:
    mass = published_start() @ np.linalg.matrix_power(published_matrix(), month)
    assert mass[PUBLISHED.index("DEF")] == pytest.approx(share, abs=0.0006)


@pytest.mark.parametrize(
    ("state", "pd"),
    [
        ("TRN", 0.007), ("REV", 0.015), ("STR", 0.045), ("DIS", 0.105),
        ("HRD", 0.06), ("D1", 0.22), ("D2", 0.55), ("D3", 0.85),
    ],
)  # fmt: skip
def test_the_published_pd_of_each_state(state: str, pd: float) -> None:
    year = np.linalg.matrix_power(published_matrix(), 12)
    assert year[PUBLISHED.index(state), PUBLISHED.index("DEF")] == pytest.approx(pd, abs=0.006)


def test_the_delinquent_share_settles_as_published() -> None:
    late = [PUBLISHED.index(name) for name in ("D1", "D2", "D3")]
    for month in (12, 24, 36, 48):
        mass = published_start() @ np.linalg.matrix_power(published_matrix(), month)
        assert 0.022 <= mass[late].sum() / (1 - mass[PUBLISHED.index("DEF")]) <= 0.027


def test_rows_are_distributions_and_both_chains_agree_outside_bust_outs() -> None:
    matrix, published = transition_matrix(), published_matrix()
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(published.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(start_mix().sum(), 1.0)
    for origin in PUBLISHED[:9]:
        for target in (*PUBLISHED[:9], "DEF"):
            simulated = matrix[STATES.index(origin), STATES.index(target)]
            assert simulated == published[PUBLISHED.index(origin), PUBLISHED.index(target)]
    moves = split_moves()
    np.testing.assert_array_equal(moves.worse + moves.other, matrix)


@given(share=st.floats(0.001, 0.999), delta=st.floats(-6, 6))
def test_modulation_shifts_the_log_odds(share: float, delta: float) -> None:
    got = modulate(np.array([share]), np.array([delta]))[0]
    assert got == pytest.approx(expit(logit(share) + delta), rel=1e-9)


def test_simulated_moves_follow_the_modulated_matrix() -> None:
    delta = 0.7
    states = simulate_states(np.random.default_rng(1), np.full((6000, 30), delta))
    counts = np.zeros((len(STATES), len(STATES)))
    np.add.at(counts, (states[:, :-1].ravel(), states[:, 1:].ravel()), 1)
    worse = {"STR": ("DIS", "HRD", "D1"), "REV": ("STR", "DIS", "HRD", "D1"), "D1": ("D2",), "D2": ("D3",)}
    table = published_matrix()
    for name, targets in worse.items():
        row = counts[STATES.index(name)]
        base = sum(table[PUBLISHED.index(name), PUBLISHED.index(target)] for target in targets)
        expected = expit(logit(base) + delta)
        seen = sum(row[STATES.index(target)] for target in targets) / row.sum()
        assert abs(seen - expected) < 4 * np.sqrt(expected * (1 - expected) / row.sum()), name
    assert counts[DEF].sum() == counts[DEF, DEF]


def test_shocks_last_three_to_nine_months() -> None:
    ages = simulate_shocks(np.random.default_rng(0), 4000, 60, 0.006)
    ended = (ages[:, :-1] > 0) & (ages[:, 1:] <= 1) & (ages[:, 1:] != ages[:, :-1] + 1)
    lengths = ages[:, :-1][ended]
    assert set(lengths) == set(range(SHOCK_MIN, SHOCK_MAX + 1))
    assert np.bincount(lengths)[SHOCK_MIN:].min() > 0.7 * len(lengths) / 7
    assert (ages > 0).mean() == pytest.approx(0.006 * 6 / (1 + 0.006 * 6), abs=0.004)


def test_without_a_recession_the_simulated_book_keeps_the_published_marginals() -> None:
    config = ReferenceConfig(recession_months=0, worsening_shift=-0.45)
    economy = simulate_economy(config, 60)
    states = np.concatenate([simulate_block(config, economy, index).states for index in range(4)])
    rolled = (states == DEF).mean(axis=0)
    assert rolled[6] == pytest.approx(0.005, abs=0.002)
    assert rolled[12] == pytest.approx(0.018, abs=0.004)
    assert rolled[24] == pytest.approx(0.046, abs=0.008)
    late = ((BUCKET[states] > 0) & (states != DEF)).sum(axis=0) / (states != DEF).sum(axis=0)
    assert 0.018 <= late[24] <= 0.027
