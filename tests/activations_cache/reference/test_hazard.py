import numpy as np
import pytest

from activations_cache.reference.chain import (
    DEF,
    REV,
    SHOCK_END,
    STATES,
    seasoning,
    simulate_shocks,
    simulate_states,
    transition_matrix,
)
from activations_cache.reference.hazard import (
    TERMS,
    Rows,
    first_default,
    mean_log_odds,
    sigmoid,
    true_pd,
    worsening,
)

NEVER = -60.0


def rows(states: np.ndarray, **changes: np.ndarray) -> Rows:
    m = len(states)
    plain = Rows(
        state=states,
        shock=np.zeros(m, dtype=np.int64),
        month=np.zeros(m, dtype=np.int64),
        mob=np.full(m, 5),
        tilt=np.zeros(m),
        constant=np.full(m, NEVER),
        varying=np.zeros(m),
    )
    return plain._replace(**changes)


def neutral_cycle() -> np.ndarray:
    """The cycle under which an account of 5 months on book has unmodulated moves."""
    return -seasoning(5 + np.arange(13)) / 0.25


def test_without_modulation_the_pd_is_a_matrix_power() -> None:
    states = np.arange(DEF)
    got = true_pd(rows(states), np.zeros((2, len(STATES))), neutral_cycle(), shock_rate=0.0)
    np.testing.assert_allclose(
        got, np.linalg.matrix_power(transition_matrix(), 12)[states, DEF], rtol=1e-9, atol=1e-12
    )


def test_a_constant_hazard_compounds_with_the_chain() -> None:
    cycle, log_odds = np.zeros(13), -4.0
    frozen = rows(np.array([REV]), tilt=np.array([-40.0]), constant=np.array([log_odds]))
    got = true_pd(frozen, np.zeros((2, len(STATES))), cycle, shock_rate=0.0)
    assert got[0] == pytest.approx(1 - (1 - 1 / (1 + np.exp(4.0))) ** 12, rel=0.01)  # bust-outs add 0.7%


def test_the_pd_agrees_with_simulation() -> None:
    n, horizon, shift, log_odds = 12_000, 13, 0.4, -5.0
    rng = np.random.default_rng(3)
    shock = simulate_shocks(rng, n, horizon, 0.05)
    cycle = np.linspace(0, 2, horizon)
    delta = worsening(np.full((n, 1), shift), cycle, np.arange(horizon)[None, :], (shock > 0).astype(float))
    states = simulate_states(rng, delta)
    default = first_default(
        rng, states, np.broadcast_to(sigmoid(log_odds + TERMS["u"] * cycle), states.shape).copy()
    )
    predicted = true_pd(
        rows(
            states[:, 0],
            shock=shock[:, 0],
            mob=np.zeros(n, dtype=np.int64),
            tilt=np.full(n, shift),
            constant=np.full(n, log_odds),
        ),
        np.zeros((2, len(STATES))),
        cycle,
        shock_rate=0.05,
    )
    seen = default <= 12
    for state in range(6):
        chosen = states[:, 0] == state
        error = seen[chosen].mean() - predicted[chosen].mean()
        assert abs(error) < 4 * np.sqrt(predicted[chosen].mean() / chosen.sum()), STATES[state]


def test_mean_log_odds_is_the_log_of_the_mean_odds() -> None:
    states, shock = np.array([[0, 0, 1]]), np.array([[0, 0, 3]])
    varying = np.array([[1.0, 2.0, -1.0]])
    got = mean_log_odds(states, shock, varying)
    assert got[0, 0] == pytest.approx(np.log((np.e + np.e**2) / 2))
    assert got[1, 1] == pytest.approx(-1.0)
    assert got[0, STATES.index("D2")] == TERMS["bkt_2"]


def test_first_default_takes_the_earlier_route() -> None:
    states = np.array([[0, 0, 0, DEF], [0, 0, 0, DEF], [0, 0, 0, 0]])
    hazard = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    got = first_default(np.random.default_rng(0), states, hazard)
    np.testing.assert_array_equal(got, [2, 3, 4])


def test_every_shock_ends_by_its_ninth_month() -> None:
    assert SHOCK_END[-1] == 1.0 and SHOCK_END[2] == 0.0 and SHOCK_END[3] == pytest.approx(1 / 7)
