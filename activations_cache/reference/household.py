"""What the current account and the bureau show: salary, cash flow, returned items, inquiries, trades."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .chain import BUCKET, BoolArray, FloatArray, IntArray
from .population import People

# By state, in the order of chain.STATES: TRN REV STR DIS HRD DOR D1 D2 D3 Q1 Q2 Q3 BUST B1 B2 B3 DEF.
_SPEND = np.array([0.86, 0.95, 1.01, 1.05, 0.92, 0.86, 1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0])
_INQUIRY = np.array(
    [0.08, 0.12, 0.30, 0.45, 0.10, 0.02, 0.35, 0.3, 0.2, 0.45, 0.45, 0.45, 0.6, 0.2, 0.1, 0.1, 0.0]
)
_LATE = np.array(
    [-3.0, 0.0, 2.0, 6.0, 5.0, -3.0, 12.0, 12.0, 12.0, -4.0, -4.0, -4.0, 10.0, 12.0, 12.0, 12.0, 12.0]
)
BIAS = float(np.exp(0.3)) - 1.0


class Household(NamedTuple):
    """The current account of one block; every array has shape [n, horizon], in currency units."""

    income: FloatArray
    inflow: FloatArray
    outflow: FloatArray
    min_bal: FloatArray
    nsf: FloatArray
    nsf_int: FloatArray
    gamble: FloatArray


class Bureau(NamedTuple):
    """What other lenders see of one block; every array has shape [n, horizon]."""

    inq: FloatArray
    """Inquiries that happened."""
    inq_shown: FloatArray
    """Inquiries in the panel: more for the protected in world 2."""
    new_tr: FloatArray
    ntr: FloatArray
    file_age: FloatArray


def salary_gaps(rng: np.random.Generator, shock: IntArray) -> BoolArray:
    """Return whether no salary arrives, [n, horizon]: for 1 to 4 months, often as a shock begins."""
    n, horizon = shock.shape
    gap = np.zeros((n, horizon), dtype=np.bool_)
    left = np.zeros(n, dtype=np.int64)
    for k in range(horizon):
        chance = np.where((shock[:, k] == 1) & (k > 0), 0.35, 0.003)
        begins = (left == 0) & (rng.random(n) < chance)
        left = np.where(begins, rng.integers(1, 5, n), left)
        gap[:, k] = left > 0
        left = np.maximum(left - 1, 0)
    return gap


def simulate_household(
    rng: np.random.Generator, people: People, states: IntArray, shock: IntArray, gap: BoolArray
) -> Household:
    """Draw the current account; an income shock leaves 0.55 of the salary, a gap none."""
    shape = states.shape
    base = people.income[:, None]
    spread = np.where(people.self_employed, 0.35, 0.05)[:, None]
    salary = base * np.exp(spread * rng.standard_normal(shape)) * np.where(shock > 0, 0.55, 1.0) * ~gap
    inflow = salary + 0.05 * base * rng.exponential(1.0, shape)
    need = _SPEND[states] * np.exp(0.12 * rng.standard_normal(shape)) * np.where(shock > 0, 0.75, 1.0)
    outflow = base * need * np.where(gap, 0.7, 1.0)
    low = np.zeros(shape)
    level = people.cushion * np.exp(0.2 * rng.standard_normal(shape[0]))
    noise = 0.06 * base * rng.standard_normal(shape)
    for k in range(shape[1]):
        level = 0.85 * level + 0.15 * people.cushion + 0.3 * (inflow - outflow)[:, k] + noise[:, k]
        low[:, k] = level
    below = np.maximum(-low, 0.0)
    gamble = people.gambles[:, None] * outflow * rng.beta(1.5, 20.0, shape) * (rng.random(shape) < 0.7)
    return Household(
        income=np.round(salary, 2),
        inflow=np.round(inflow, 2),
        outflow=np.round(outflow, 2),
        min_bal=np.round(low, 2),
        nsf=rng.poisson(np.where(low < 0, 1.2, 0.01)).astype(np.float64),
        nsf_int=np.round(below * (below > 50.0) * 0.18 / 12.0, 2),
        gamble=np.round(gamble, 2),
    )


def simulate_bureau(rng: np.random.Generator, people: People, states: IntArray, *, biased: bool) -> Bureau:
    """Draw inquiries (Poisson by state, and bursts of two months), trades and file age."""
    shape = states.shape
    begins = rng.random(shape) < 0.004
    burst = begins.copy()
    burst[:, 1:] |= begins[:, :-1]
    rate = _INQUIRY[states] * np.exp(0.25 * people.trace)[:, None] + 2.2 * burst
    inq = rng.poisson(rate).astype(np.float64)
    extra = rng.poisson(rate * BIAS) * people.protected[:, None] * biased
    opened = rng.binomial(inq.astype(np.int64), 0.3)
    age = people.file_age[:, None] + np.arange(shape[1])
    trades = people.trades[:, None] + np.cumsum(opened, axis=1)
    return Bureau(
        inq, inq + extra, opened.astype(np.float64), trades.astype(np.float64), age.astype(np.float64)
    )


def days_late(rng: np.random.Generator, people: People, states: IntArray) -> FloatArray:
    """Return the days between due date and payment, [n, horizon]; negative is early."""
    bucket = BUCKET[states]
    days = _LATE[states] + people.punctuality[:, None] + 2.0 * rng.standard_normal(states.shape)
    days = np.where(bucket > 0, 30.0 * bucket + np.clip(days, 0.0, 29.0), np.clip(days, -20.0, 29.0))
    return np.round(days)
