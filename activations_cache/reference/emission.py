"""What a card statement shows of the hidden state: limits, payments, balances, purchases.

A payment in month k answers the statement of month k - 1. The state sets the mix of payment behaviours and a
target utilisation that the balance approaches (AR(1), coefficient 0.7); a balance cannot fall faster than
payments allow, so that bal[k] = bal[k-1] - pay[k] + interest + cash[k] + purch[k] with purch >= 0, refunds
and rounding aside.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .chain import BUCKET, BUST, DIS, DOR, HRD, Q1, Q3, REV, STR, TRN, BoolArray, FloatArray, IntArray
from .population import People

RISE = 0.06
PHI, NOISE_SD = 0.7, 0.06
# By state, in the order of chain.STATES: TRN REV STR DIS HRD DOR D1 D2 D3 Q1 Q2 Q3 BUST B1 B2 B3 DEF.
_TARGET = np.array(
    [0.12, 0.45, 0.78, 0.93, 0.85, 0.01, 0.9, 0.9, 0.9, 0.15, 0.15, 0.15, 0.95, 0.95, 0.95, 0.95, 0.9]
)
_CASH = np.array([0.02, 0.08, 0.20, 0.35, 0.12, 0.0, 0, 0, 0, 0.02, 0.02, 0.02, 0.5, 0, 0, 0, 0])
_RAISE = np.array([0.012, 0.010, 0, 0, 0, 0.002, 0, 0, 0, 0.08, 0.08, 0.08, 0, 0, 0, 0, 0])
_CUT = np.array([0, 0, 0.004, 0.015, 0.01, 0.002, 0.05, 0.05, 0.05, 0, 0, 0, 0, 0.05, 0.05, 0.05, 0])
# Shares of: nothing, part of the minimum, the minimum, a fraction of the balance, all of it.
_PAYMENTS = {
    "TRN": (0.00, 0.00, 0.01, 0.04, 0.95),
    "REV": (0.01, 0.01, 0.08, 0.88, 0.02),
    "STR": (0.08, 0.04, 0.70, 0.18, 0.00),
    "DIS": (0.30, 0.40, 0.25, 0.05, 0.00),
    "HRD": (0.25, 0.35, 0.35, 0.05, 0.00),
    "DOR": (0.00, 0.00, 0.00, 0.00, 1.00),
    "late": (0.80, 0.15, 0.05, 0.00, 0.00),
    "quiet": (0.00, 0.00, 0.00, 0.02, 0.98),
    "bust": (0.93, 0.07, 0.00, 0.00, 0.00),
}
_ORDER = ("TRN", "REV", "STR", "DIS", "HRD", "DOR", *("late",) * 3, *("quiet",) * 3, *("bust",) * 4, "late")
_PAY_MIX = np.cumsum([_PAYMENTS[name] for name in _ORDER], axis=1)[:, :-1]


class Card(NamedTuple):
    """The card of one block; every array has shape [n, horizon], money in currency units."""

    lim: FloatArray
    bal: FloatArray
    pay: FloatArray
    due: FloatArray
    purch: FloatArray
    cash: FloatArray
    rising: IntArray
    """Months that the running episode of rising utilisation has lasted, 0 outside one."""


class _Month(NamedTuple):
    """What the month loop carries on, each of shape [n]."""

    lim: FloatArray
    bal: FloatArray
    due: FloatArray
    left: IntArray
    risen: IntArray


def forbearance(rng: np.random.Generator, states: IntArray) -> tuple[BoolArray, BoolArray]:
    """Return whether the forbearance flag is set, and whether the account was modified; both [n, horizon].

    The flag lags hardship: it is set from the third or fourth month of a spell on.
    """
    n, horizon = int(states.shape[0]), int(states.shape[1])
    forb = np.zeros((n, horizon), dtype=np.bool_)
    modified = np.zeros((n, horizon), dtype=np.bool_)
    spell: IntArray = np.zeros(n, dtype=np.int64)
    wait = rng.integers(2, 4, n)
    changed = np.zeros(n, dtype=np.bool_)
    for k in range(horizon):
        spell = (spell + 1) * (states[:, k] == HRD)
        forb[:, k] = spell > wait
        changed |= (spell == wait + 1) & (rng.random(n) < 0.5)
        modified[:, k] = changed
        wait = np.where(spell == 0, rng.integers(2, 4, n), wait)
    return forb, modified


def simulate_card(
    rng: np.random.Generator,
    people: People,
    states: IntArray,
    *,
    rate: FloatArray,
    due_factor: FloatArray,
    gap_begins: BoolArray,
) -> Card:
    """Draw limits, balances and payments month by month.

    Parameters
    ----------
    rng
        Generator of this block.
    people
        The entities, n of them.
    states
        Hidden states, [n, horizon].
    rate
        Interest rate in percent a year, [n, horizon].
    due_factor
        Share of the usual minimum that is asked for (forbearance, modification), [n, horizon].
    gap_begins
        Whether the salary stops this month, [n, horizon]: half of them begin to live on the card.
    """
    n, horizon = int(states.shape[0]), int(states.shape[1])
    out = {name: np.zeros((n, horizon)) for name in Card._fields if name != "rising"}
    rising = np.zeros((n, horizon), dtype=np.int64)
    zero = np.zeros(n, dtype=np.int64)
    start = np.where(states[:, 0] == DOR, 0.0, _target(people, states[:, 0]) + rng.normal(0.0, 0.08, n))
    bal: FloatArray = (np.clip(start, 0.0, 1.1) * people.lim).round(2)
    month = _Month(people.lim, bal, _minimum(bal, due_factor[:, 0]), zero, zero)
    for k in range(horizon):
        before, now = states[:, max(k - 1, 0)], states[:, k]
        lim = _limit(rng, month, now)
        pay = _payment(rng, month, before, now, people.rounds) if k else np.zeros(n)
        cash = _cash(rng, people, now, lim)
        interest = np.maximum(month.bal - pay, 0.0) * rate[:, k] / 1200.0 * (pay < 0.95 * month.bal)
        floor = month.bal - pay + cash + np.round(interest, 2)
        left, risen = _episode(rng, month, now, gap_begins[:, k])
        december = people.seasonal & ((people.entry + k) % 12 == 11)
        desired = _desired(rng, people, now, before, month.bal / lim, december)
        desired = np.where(risen > 0, np.maximum(month.bal / lim, 0.0) + RISE, desired)
        frozen = (BUCKET[now] > 0) | ((now == HRD) & (rng.random(n) < 0.6))
        bal = np.where(frozen, floor, np.maximum(desired * lim, floor)).round(2)
        refund = np.isin(now, (TRN, DOR)) & (rng.random(n) < 0.008) & (risen == 0)
        purch = np.where(refund, 0.0, np.round(bal - floor, 2))
        bal = np.where(refund, -rng.uniform(5.0, 150.0, n).round(2), bal)
        due = _minimum(bal, due_factor[:, k])
        month = _Month(lim, bal, due, left, risen)
        rising[:, k] = risen
        shown = (lim, bal, pay, due, purch, cash)
        for name, value in zip(out, shown, strict=True):
            out[name][:, k] = value
    return Card(**out, rising=rising)


def _target(people: People, state: IntArray) -> FloatArray:
    usual = np.log(_TARGET[state] / (1.0 - _TARGET[state])) + np.where(state == BUST, 0.0, people.taste)
    target: FloatArray = 1.0 / (1.0 + np.exp(-usual))
    return target


def _desired(
    rng: np.random.Generator,
    people: People,
    now: IntArray,
    before: IntArray,
    util: FloatArray,
    december: BoolArray,
) -> FloatArray:
    """Return the utilisation the customer would like to have this month, [n]."""
    n = len(now)
    target = _target(people, now)
    noise = NOISE_SD * rng.standard_t(4, n) / np.sqrt(2.0)
    spree = (rng.random(n) < 0.006) * rng.uniform(0.2, 0.5, n)
    wish = target + PHI * (util - target) + noise + spree + np.where(december & (now != DOR), 0.15, 0.0)
    wish = np.where((now >= Q1) & (now <= Q3), np.minimum(wish, 0.27), wish)
    wish = np.where(now == BUST, 0.97 + 0.2 * noise, wish)
    dormant = np.where((rng.random(n) < 0.7) | (before != DOR), 0.0, rng.uniform(0.0, 0.012, n))
    return np.where(now == DOR, dormant, np.clip(wish, 0.0, 1.15))


def _limit(rng: np.random.Generator, month: _Month, now: IntArray) -> FloatArray:
    draw, size = rng.random(len(now)), rng.uniform(0.1, 0.4, len(now))
    steady = month.risen > 0
    factor = np.where(draw < _RAISE[now], 1.0 + size, np.where(draw > 1.0 - _CUT[now], 1.0 - size, 1.0))
    changed = np.maximum(100.0, 100.0 * np.round(month.lim * factor / 100.0))
    lim: FloatArray = np.where(steady | (factor == 1.0), month.lim, changed)
    return lim


def _cash(rng: np.random.Generator, people: People, now: IntArray, lim: FloatArray) -> FloatArray:
    chance = np.minimum(_CASH[now] * np.where(people.cash_user, 3.0, 0.6), 0.95)
    takes = rng.random(len(now)) < chance
    cash: FloatArray = (lim * rng.uniform(0.005, 0.03, len(now)) * takes).round(2)
    return cash


def _minimum(bal: FloatArray, factor: FloatArray) -> FloatArray:
    asked = np.minimum(np.maximum(bal, 0.0), np.maximum(25.0, 0.03 * bal) * factor)
    due: FloatArray = asked.round(2)
    return due


def _payment(
    rng: np.random.Generator, month: _Month, before: IntArray, now: IntArray, rounds: BoolArray
) -> FloatArray:
    """Return what is paid against last month's statement, [n]; whoever cures pays the arrears."""
    n = len(now)
    bal, due = np.maximum(month.bal, 0.0), month.due
    kind = (rng.random(n)[:, None] >= _PAY_MIX[now]).sum(axis=1)
    share = np.where(now == TRN, rng.uniform(0.3, 0.95, n), rng.beta(2.0, 8.0, n))
    part, minimum = due * rng.uniform(0.2, 0.95, n), due * rng.uniform(1.0, 1.03, n)
    amount = np.choose(kind, [np.zeros(n), part, minimum, np.maximum(minimum, share * bal), bal])
    cures = (BUCKET[before] > 0) & (BUCKET[now] == 0)
    amount = np.where(cures, np.maximum(amount, due * (BUCKET[before] + 1)), amount)
    amount = np.where(now == DOR, bal, np.minimum(amount, bal))
    return np.where(rounds, 10.0 * np.ceil(amount / 10.0), np.round(amount, 2))


def _episode(
    rng: np.random.Generator, month: _Month, now: IntArray, gap_begins: BoolArray
) -> tuple[IntArray, IntArray]:
    """Return the months left of the episode of rising utilisation and the months it has lasted, both [n]."""
    n = len(now)
    able = np.isin(now, (TRN, REV, STR, DIS))
    starts = (month.left == 0) & (month.bal >= 0) & (month.bal < 0.55 * month.lim)
    starts &= rng.random(n) < np.where(gap_begins, 0.5, 0.02)
    left = np.where(starts, rng.integers(5, 10, n), np.maximum(month.left - 1, 0)) * able
    risen = np.where(left > 0, month.risen + 1, 0)
    return left, risen


def interest_rate(people: People, mob: IntArray, policy: FloatArray, penalty: BoolArray) -> FloatArray:
    """Return the interest rate in percent a year, with teaser and penalty, [n, horizon]."""
    teaser = mob < people.teaser[:, None]
    own = people.rate[:, None] + policy - 6.0 * teaser + 4.0 * penalty
    rate: FloatArray = np.round(own, 2)
    return rate
