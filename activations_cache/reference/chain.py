"""The latent chain: how an account moves between hidden states, month by month.

The published chain has eleven states: TRN transactor, REV revolver, STR stretched, DIS distressed, HRD
hardship, DOR dormant, D1, D2, D3 (30, 60, 90 days past due), DEF (120 days, absorbing) and BUST. Two parts of
it are not Markov as written and become states here: a bust-out stays quiet for three months or more (Q1, Q2,
Q3) before it draws (BUST), and then rolls straight to default with probability 0.95 a month (B1, B2, B3,
shown as 30, 60, 90 days past due).

Worsening moves are modulated: a row's total probability w of moving to a worse state becomes sigmoid(logit(w)
+ delta), shared among the worse states as before, and the other moves share the rest. Bust-outs are fraud:
they are not modulated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

PUBLISHED = ("TRN", "REV", "STR", "DIS", "HRD", "DOR", "D1", "D2", "D3", "DEF", "BUST")
_ROWS: dict[str, dict[str, float]] = {
    "TRN": {
        "TRN": 0.945,
        "REV": 0.035,
        "STR": 0.003,
        "DIS": 0.002,
        "DOR": 0.012,
        "D1": 0.0025,
        "BUST": 0.0005,
    },
    "REV": {"TRN": 0.020, "REV": 0.940, "STR": 0.025, "DIS": 0.004, "HRD": 0.001, "DOR": 0.003, "D1": 0.006}
    | {"BUST": 0.001},
    "STR": {"TRN": 0.003, "REV": 0.050, "STR": 0.885, "DIS": 0.030, "HRD": 0.004, "DOR": 0.001, "D1": 0.026}
    | {"BUST": 0.001},
    "DIS": {"TRN": 0.001, "REV": 0.010, "STR": 0.060, "DIS": 0.785, "HRD": 0.030, "DOR": 0.001, "D1": 0.113},
    "HRD": {"REV": 0.030, "STR": 0.060, "DIS": 0.040, "HRD": 0.830, "D1": 0.040},
    "DOR": {"TRN": 0.030, "REV": 0.015, "STR": 0.001, "DIS": 0.001, "DOR": 0.950, "D1": 0.002, "BUST": 0.001},
    "D1": {"TRN": 0.020, "REV": 0.230, "STR": 0.200, "DIS": 0.100, "HRD": 0.030, "D1": 0.100, "D2": 0.320},
    "D2": {"TRN": 0.005, "REV": 0.050, "STR": 0.060, "DIS": 0.120, "HRD": 0.050, "D1": 0.075, "D2": 0.080}
    | {"D3": 0.560},
    "D3": {"TRN": 0.002, "REV": 0.010, "STR": 0.020, "DIS": 0.050, "HRD": 0.038, "D1": 0.020, "D2": 0.030}
    | {"D3": 0.080, "DEF": 0.750},
    "BUST": {"BUST": 0.5, "D1": 0.5},
    "DEF": {"DEF": 1.0},
}
START: dict[str, float] = {"TRN": 0.34, "REV": 0.36, "STR": 0.12, "DIS": 0.03, "HRD": 0.01, "DOR": 0.14}

STATES = (*PUBLISHED[:9], "Q1", "Q2", "Q3", "BUST", "B1", "B2", "B3", "DEF")
TRN, REV, STR, DIS, HRD, DOR, D1, D2, D3, Q1, Q2, Q3, BUST, B1, B2, B3, DEF = range(len(STATES))
SHOWN_NAMES = (*PUBLISHED[:9], "BUST_QUIET", "BUST_QUIET", "BUST_QUIET", "BUST", "D1", "D2", "D3", "DEF")
BUCKET: IntArray = np.array([0, 0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 1, 2, 3, 4])
_BUST_ROWS: dict[str, dict[str, float]] = {
    "Q1": {"Q2": 1.0},
    "Q2": {"Q3": 1.0},
    "Q3": {"Q3": 0.75, "BUST": 0.25},
    "BUST": {"BUST": 0.5, "B1": 0.5},
    "B1": {"B2": 0.95, "REV": 0.05},
    "B2": {"B3": 0.95, "STR": 0.05},
    "B3": {"DEF": 0.95, "STR": 0.05},
}
_SEVERITY = {"TRN": 0, "DOR": 0, "REV": 1, "STR": 2, "DIS": 3, "HRD": 4, "D1": 5, "D2": 6, "D3": 7, "DEF": 8}

SHOCK_MIN, SHOCK_MAX = 3, 9
# The chance that a shock ends after its a-th month, for lengths uniform on 3..9; index 0 is "no shock".
SHOCK_END: FloatArray = np.array(
    [0.0] + [1.0 / (SHOCK_MAX + 1 - a) if a >= SHOCK_MIN else 0.0 for a in range(1, SHOCK_MAX + 1)]
)


def published_matrix() -> FloatArray:
    """Return the published monthly transition matrix, shape [11, 11], in the order of `PUBLISHED`."""
    return np.array([[_ROWS[origin].get(target, 0.0) for target in PUBLISHED] for origin in PUBLISHED])


def transition_matrix() -> FloatArray:
    """Return the matrix that is simulated, shape [17, 17], in the order of `STATES`; entering BUST is Q1."""
    rows = {name: dict(_ROWS[name]) for name in (*PUBLISHED[:9], "DEF")}
    for row in rows.values():
        if "BUST" in row:
            row["Q1"] = row.pop("BUST")
    rows |= _BUST_ROWS
    return np.array([[rows[origin].get(target, 0.0) for target in STATES] for origin in STATES])


def start_mix() -> FloatArray:
    """Return the distribution of the first month's state, shape [17]."""
    return np.array([START.get(name, 0.0) for name in STATES])


class Moves(NamedTuple):
    """Worsening moves and the rest, both [17, 17]; together they are the transition matrix."""

    worse: FloatArray
    other: FloatArray

    @property
    def worse_share(self) -> FloatArray:
        """The probability of worsening from each state before modulation, shape [17]."""
        total: FloatArray = self.worse.sum(axis=1)
        return total


def split_moves() -> Moves:
    """Split the transition matrix by whether the target is worse than the origin."""
    matrix = transition_matrix()
    severity = np.array([_SEVERITY.get(name, -1) for name in STATES])
    known = (severity[:, None] >= 0) & (severity[None, :] >= 0)
    worse = known & (severity[None, :] > severity[:, None])
    return Moves(np.where(worse, matrix, 0.0), np.where(worse, 0.0, matrix))


def modulate(share: FloatArray, delta: FloatArray) -> FloatArray:
    """Return sigmoid(logit(share) + delta), elementwise and broadcast; 0 stays 0."""
    odds = share * np.exp(delta)
    result: FloatArray = odds / (1.0 - share + odds)
    return result


def seasoning(mob: IntArray) -> FloatArray:
    """Return the log-odds of seasoning: a Weibull-like hump over months on book with its peak at 21."""
    ratio = mob / 21.0
    hump: FloatArray = 0.4 * (ratio**1.5 * np.exp(1.5 * (1.0 - ratio)) - 0.5)
    return hump


def simulate_shocks(rng: np.random.Generator, n: int, horizon: int, rate: float) -> IntArray:
    """Draw income shocks; return the month of the running shock (1 to 9, 0 for none), shape [n, horizon]."""
    ages = np.zeros((n, horizon), dtype=np.int64)
    running = rng.random(n) < rate * (SHOCK_MIN + SHOCK_MAX) / 2
    ages[:, 0] = np.where(running, rng.integers(1, SHOCK_MIN + 1, n), 0)
    for k in range(1, horizon):
        before, draw = ages[:, k - 1], rng.random(n)
        goes_on = (before > 0) & (draw >= SHOCK_END[before])
        begins = (before == 0) & (draw < rate)
        ages[:, k] = np.where(goes_on, before + 1, begins.astype(np.int64))
    return ages


def simulate_states(rng: np.random.Generator, delta: FloatArray) -> IntArray:
    """Draw the path of hidden states.

    Parameters
    ----------
    rng
        Generator of this block.
    delta
        Log-odds added to the worsening moves out of month k, shape [n, horizon].

    Returns
    -------
    Index into `STATES`, shape [n, horizon]; column 0 is the first month of the account in the book.
    """
    n, horizon = int(delta.shape[0]), int(delta.shape[1])
    moves = split_moves()
    share: FloatArray = moves.worse_share
    other: FloatArray = (moves.other / (1.0 - share)[:, None]).cumsum(axis=1)
    shares = np.divide(moves.worse, share[:, None], out=np.ones_like(moves.worse), where=share[:, None] > 0)
    worse: FloatArray = shares.cumsum(axis=1)
    states = np.zeros((n, horizon), dtype=np.int64)
    states[:, 0] = (rng.random(n)[:, None] >= start_mix()[:DOR].cumsum()).sum(axis=1)
    for k in range(1, horizon):
        before = states[:, k - 1]
        worsens = rng.random(n) < modulate(share[before], delta[:, k - 1])
        cumulative = np.where(worsens[:, None], worse[before], other[before])[:, :-1]
        states[:, k] = (rng.random(n)[:, None] >= cumulative).sum(axis=1)
    return states
