"""How default arises, and the true probability of it.

Two routes, whichever comes first:

- rolling: the chain reaches DEF, 120 days past due; the route that the published marginals describe;
- the hazard: an insolvency without rolling, drawn in month k for month k + 1 with
  logit h = intercept + 1.6 [bkt = 1] + 3.0 [bkt = 2] + 4.6 [bkt >= 3] + 1.2 (util - 0.5)+ + 0.8 min_pay / 6
  + 0.9 [no salary] + 0.6 [inq_6m >= 3] + 0.4 u - 0.5 [transactor] + theta
  + 1.0 [util_rising and no salary] + 0.6 [xor], and in world 3 the effect of the protected attribute.

`min_pay` counts the minimum-only payments of the last 6 months. The last two terms are this panel's own:
without them no interaction would be planted.

The true PD of a row conditions on everything hidden at that row, and on the economy's path (the calendar is
what it is). The distribution over (state, month of the income shock) is carried 12 months forward exactly,
for the row's own theta, months on book, affordability and constants. Within a (state, shock) the varying
terms of the hazard are replaced by their log-mean-exp over the block, plus the row's own deviation from it
fading as 0.8^months; the first month is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .chain import BUCKET, DEF, SHOCK_END, STATES, FloatArray, IntArray, modulate, seasoning, split_moves
from .config import OUTCOME_MONTHS, ReferenceConfig

TERMS: dict[str, float] = {
    "bkt_1": 1.6,
    "bkt_2": 3.0,
    "bkt_3": 4.6,
    "util_above_half": 1.2,
    "min_pay_share": 0.8,
    "income_loss": 0.9,
    "inq_6m_3": 0.6,
    "u": 0.4,
    "transactor": -0.5,
    "util_rising_and_income_loss": 1.0,
    "xor_trades_age": 0.6,
}
U_WORSENING, SHOCK_WORSENING, AFFORD_WORSENING = 0.25, 1.2, -0.2
FADE = 0.8
BUCKET_LOG_ODDS = np.array([0.0, TERMS["bkt_1"], TERMS["bkt_2"], TERMS["bkt_3"], TERMS["bkt_3"]])


class Varying(NamedTuple):
    """The observable parts of the hazard, each [n, horizon]; flags are 0 or 1."""

    util: FloatArray
    min_pay: FloatArray
    income_loss: FloatArray
    inq_6m: FloatArray
    transactor: FloatArray
    interaction: FloatArray

    def log_odds(self, states: IntArray) -> FloatArray:
        """Return their contribution to logit h, delinquency included, [n, horizon]."""
        total: FloatArray = (
            BUCKET_LOG_ODDS[BUCKET[states]]
            + TERMS["util_above_half"] * np.maximum(self.util - 0.5, 0.0)
            + TERMS["min_pay_share"] * self.min_pay / 6.0
            + TERMS["income_loss"] * self.income_loss
            + TERMS["inq_6m_3"] * (self.inq_6m >= 3)
            + TERMS["transactor"] * self.transactor
            + TERMS["util_rising_and_income_loss"] * self.interaction
        )
        return total


class Rows(NamedTuple):
    """The rows whose PD is wanted, each [m]."""

    state: IntArray
    shock: IntArray
    month: IntArray
    """Calendar month."""
    mob: IntArray
    tilt: FloatArray
    """Constant log-odds of worsening: shift, theta, affordability."""
    constant: FloatArray
    """Constant part of logit h: intercept, theta, xor, protected attribute."""
    varying: FloatArray
    """The observable part of logit h in this row."""


def worsening(tilt: FloatArray, u: FloatArray, mob: IntArray, shocked: FloatArray) -> FloatArray:
    """Return the log-odds added to worsening moves: tilt + 0.25 u + seasoning(mob) + 1.2 [income shock]."""
    return tilt + U_WORSENING * u + seasoning(mob) + SHOCK_WORSENING * shocked


def tilt(config: ReferenceConfig, theta: FloatArray, affordability: FloatArray) -> FloatArray:
    """Return the part of the worsening log-odds that an entity keeps, [n]."""
    return config.worsening_shift + theta + AFFORD_WORSENING * affordability


def sigmoid(x: FloatArray) -> FloatArray:
    """Return 1 / (1 + exp(-x))."""
    result: FloatArray = 1.0 / (1.0 + np.exp(-x))
    return result


def first_default(rng: np.random.Generator, states: IntArray, hazard: FloatArray) -> IntArray:
    """Return the month of default by either route, `horizon` for none; shape [n].

    Parameters
    ----------
    rng
        Generator of this block.
    states
        Hidden states, [n, horizon].
    hazard
        Probability of default in the next month without rolling, [n, horizon].
    """
    event = np.zeros(states.shape, dtype=np.bool_)
    event[:, 1:] = rng.random((states.shape[0], states.shape[1] - 1)) < hazard[:, :-1]
    defaulted = event | (states == DEF)
    first: IntArray = np.where(defaulted.any(axis=1), defaulted.argmax(axis=1), states.shape[1])
    return first


def mean_log_odds(states: IntArray, shock: IntArray, varying: FloatArray) -> FloatArray:
    """Return log mean exp of the varying log-odds by (in a shock, state), shape [2, 17].

    A (shock, state) that the block does not visit gets its delinquency term alone.
    """
    size = len(STATES)
    cell = (shock > 0) * size + states
    total = np.bincount(cell.ravel(), np.exp(varying).ravel(), 2 * size)
    count = np.bincount(cell.ravel(), minlength=2 * size)
    unseen = BUCKET_LOG_ODDS[BUCKET]
    mean = np.log(np.maximum(total, 1e-300) / np.maximum(count, 1)).reshape(2, size)
    return np.where(count.reshape(2, size) > 0, mean, unseen)


def true_pd(rows: Rows, means: FloatArray, u: FloatArray, *, shock_rate: float) -> FloatArray:
    """Return the probability of default within 12 months of each row, [m].

    Parameters
    ----------
    rows
        The rows.
    means
        Output of `mean_log_odds`.
    u
        The cycle over the calendar, long enough for 12 months after the last row.
    shock_rate
        Probability a month that an income shock begins.
    """
    m, ages, size = len(rows.state), len(SHOCK_END), len(STATES)
    moves = split_moves()
    share = moves.worse_share
    mass = np.zeros((m, ages, size))
    mass[np.arange(m), rows.shock, rows.state] = 1.0
    own = rows.varying - means[(rows.shock > 0).astype(np.int64), rows.state]
    pd = np.zeros(m)
    for step in range(OUTCOME_MONTHS):
        log_odds = (rows.constant + TERMS["u"] * u[rows.month + step] + own * FADE**step)[
            :, None, None
        ] + means
        hazard = sigmoid(log_odds)
        hazard[:, :, DEF] = 0.0
        by_age = np.concatenate([hazard[:, :1], np.repeat(hazard[:, 1:], ages - 1, axis=1)], axis=1)
        pd += (mass * by_age).sum(axis=(1, 2))
        mass *= 1.0 - by_age
        delta = np.stack(
            [
                worsening(rows.tilt, u[rows.month + step], rows.mob + step, np.full(m, on))
                for on in (0.0, 1.0)
            ],
            1,
        )
        moved = modulate(share, delta[:, :, None])
        up = np.divide(moved, share, out=np.ones_like(moved), where=share > 0)
        down = (1.0 - moved) / (1.0 - share)
        pick = np.minimum(np.arange(ages), 1)
        mass = (mass * up[:, pick]) @ moves.worse + (mass * down[:, pick]) @ moves.other
        pd += mass[:, :, DEF].sum(axis=1)
        mass[:, :, DEF] = 0.0
        mass = _age(mass, shock_rate)
    return pd


def _age(mass: FloatArray, shock_rate: float) -> FloatArray:
    """Move the mass on by one month of the income shock, [m, 10, 17]."""
    out = np.zeros_like(mass)
    out[:, 0] = mass[:, 0] * (1.0 - shock_rate) + (mass[:, 1:] * SHOCK_END[1:, None]).sum(axis=1)
    out[:, 1] = mass[:, 0] * shock_rate
    out[:, 2:] = mass[:, 1:-1] * (1.0 - SHOCK_END[1:-1, None])
    return out
