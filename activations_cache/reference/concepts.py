"""The planted concepts, defined on the complete path, before any row or cell goes missing.

Every value at month k uses months up to k only. Trailing windows are shorter in an account's first months.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from .chain import BUCKET, BUST, BoolArray, FloatArray, IntArray
from .emission import Card
from .hazard import TERMS
from .household import Bureau, Household
from .population import People
from .trailing import lagged, trailing_max, trailing_min, trailing_sum

Role = Literal["planted", "latent", "distractor_visible", "distractor_withheld", "absent"]
PERSISTENCE = 6
MANY_TRADES, LONG_FILE = 5, 84
_RANDOM_SHARES = {
    "distractor_withheld_campaign": 0.05,
    "distractor_withheld_call": 0.01,
    "distractor_withheld_visit": 0.001,
    "absent_p001": 0.001,
    "absent_p01": 0.01,
    "absent_p05": 0.05,
    "absent_p20": 0.20,
}


class Concept(NamedTuple):
    """One row of the answer key's table of concepts."""

    id: str
    text: str
    role: Role
    prevalence: float
    """Share of rows aimed at."""
    sign: int | None
    """Sign of its effect on default by construction; None where the hazard does not know it."""
    strength: float | None = None
    """Its term in the monthly log-odds, where it has one of its own."""


CONCEPTS: tuple[Concept, ...] = (
    Concept(
        "transactor",
        "In each of the last 3 months the statement was zero or paid to at least 95%, and not in all of them zero",
        "planted",
        0.40,
        -1,
        TERMS["transactor"],
    ),
    Concept(
        "revolver_6m",
        "Carried a balance in each of the last 6 months, paying under 95% of every statement that was not zero",
        "planted",
        0.25,
        None,
    ),
    Concept(
        "min_pay_streak", "Paid only about the minimum in at least 4 of the last 6 months", "planted", 0.05, 1
    ),
    Concept(
        "util_rising",
        "Utilisation has risen by 6 points in each of the last 3 months or more",
        "planted",
        0.05,
        None,
    ),
    Concept("cure", "Back to current after being 30 or more days past due last month", "planted", 0.01, None),
    Concept("redefault", "30 or more days past due again within 6 months of a cure", "planted", 0.001, 1),
    Concept("income_loss", "No salary arrives this month", "planted", 0.01, 1, TERMS["income_loss"]),
    Concept("cash_adv_streak", "Cash advances in 2 of the last 3 months", "planted", 0.05, None),
    Concept("inq_burst", "3 or more inquiries in 2 months", "planted", 0.01, 1),
    Concept("bust_out", "Draws the whole limit after a quiet phase and stops paying", "planted", 0.001, 1),
    Concept("hardship", "In forbearance", "planted", 0.01, None),
    Concept("overlimit", "Balance above the limit", "planted", 0.05, 1),
    Concept("seasonal", "The December of a customer who spends more every December", "planted", 0.01, None),
    Concept("recession", "The economy is in recession this month", "planted", 0.45, 1, None),
    Concept(
        "util_rising_and_income_loss", "Utilisation is rising while no salary arrives", "planted", 0.001, 1
    )._replace(strength=TERMS["util_rising_and_income_loss"]),
    Concept(
        "xor_trades_age",
        f"Either {MANY_TRADES} or more trades or a file of {LONG_FILE} months or more, but not both",
        "planted",
        0.50,
        1,
        TERMS["xor_trades_age"],
    ),
    Concept(
        "distractor_visible_rounded", "Payments are rounded up to tens", "distractor_visible", 0.30, None
    ),
    Concept(
        "distractor_visible_statement_day",
        "Statement in the first 6 days of the month",
        "distractor_visible",
        0.20,
        None,
    ),
    Concept(
        "distractor_withheld_weekday", "Opened the account on a Monday", "distractor_withheld", 0.20, None
    ),
    Concept("distractor_withheld_campaign", "Is in a marketing campaign", "distractor_withheld", 0.05, None),
    Concept(
        "distractor_withheld_call", "Has a case open at the call centre", "distractor_withheld", 0.01, None
    ),
    Concept("distractor_withheld_visit", "Is in a branch survey", "distractor_withheld", 0.001, None),
    Concept("absent_p001", "Never generated, fires on 0.1% of rows", "absent", 0.001, None),
    Concept("absent_p01", "Never generated, fires on 1% of rows", "absent", 0.01, None),
    Concept("absent_p05", "Never generated, fires on 5% of rows", "absent", 0.05, None),
    Concept("absent_p20", "Never generated, fires on 20% of rows", "absent", 0.20, None),
)


def minimum_payment(card: Card) -> BoolArray:
    """Return whether the payment was 0.9 to 1.1 of a minimum that is under half the balance, [n, horizon]."""
    due, bal = lagged(card.due), lagged(card.bal)
    result: BoolArray = (card.pay >= 0.9 * due) & (card.pay <= 1.1 * due) & (bal > 2.0 * due)
    return result


def payment_ratio(card: Card) -> FloatArray:
    """Return the share of last month's statement that was paid, nan where there was none, [n, horizon]."""
    bal = lagged(card.bal)
    ratio: FloatArray = np.divide(card.pay, bal, out=np.full(bal.shape, np.nan), where=bal != 0)
    return ratio


def planted(
    people: People,
    states: IntArray,
    card: Card,
    household: Household,
    bureau: Bureau,
    *,
    forb: BoolArray,
    recession: BoolArray,
) -> dict[str, BoolArray]:
    """Return the concepts that shape the data or the default, each [n, horizon]."""
    bucket = BUCKET[states].astype(np.float64)
    ratio, before = payment_ratio(card), lagged(bucket)
    cure = (bucket == 0) & (before >= 1)
    recent_cure = lagged(trailing_max(cure.astype(np.float64), 6))
    full_window = np.arange(states.shape[1]) >= 6
    december = (people.entry[:, None] + np.arange(states.shape[1])) % 12 == 11
    rising = card.rising >= 3
    no_salary = household.income == 0
    return {
        "transactor": trailing_min(ratio, 3) >= 0.95,
        "revolver_6m": (trailing_max(ratio, 6) < 0.95) & (trailing_min(card.bal, 6) > 0) & full_window,
        "min_pay_streak": trailing_sum(minimum_payment(card).astype(np.float64), 6) >= 4,
        "util_rising": rising,
        "cure": cure,
        "redefault": (bucket >= 1) & (recent_cure == 1),
        "income_loss": no_salary,
        "cash_adv_streak": trailing_sum((card.cash > 0).astype(np.float64), 3) >= 2,
        "inq_burst": trailing_sum(bureau.inq, 2) >= 3,
        "bust_out": states == BUST,
        "hardship": forb,
        "overlimit": card.bal > card.lim,
        "seasonal": people.seasonal[:, None] & december,
        "recession": recession,
        "util_rising_and_income_loss": rising & no_salary,
        "xor_trades_age": (bureau.ntr >= MANY_TRADES) ^ (bureau.file_age >= LONG_FILE),
    }


def distractors(rng: np.random.Generator, people: People, shape: tuple[int, int]) -> dict[str, BoolArray]:
    """Return the concepts that predict nothing, each [n, horizon]; the withheld are in no column."""
    out: dict[str, BoolArray] = {
        "distractor_visible_rounded": np.broadcast_to(people.rounds[:, None], shape),
        "distractor_visible_statement_day": np.broadcast_to(people.statement_day[:, None] <= 6, shape),
        "distractor_withheld_weekday": np.broadcast_to((rng.integers(0, 5, shape[0]) == 0)[:, None], shape),
    }
    return out | {name: persistent(rng, shape, share) for name, share in _RANDOM_SHARES.items()}


def persistent(rng: np.random.Generator, shape: tuple[int, int], share: float) -> BoolArray:
    """Draw an on-off signal per entity that is on `share` of the time, in spells of 6 months on average."""
    out = np.zeros(shape, dtype=np.bool_)
    on = rng.random(shape[0]) < share
    begins, ends = share / (1.0 - share) / PERSISTENCE, 1.0 / PERSISTENCE
    for k in range(shape[1]):
        out[:, k] = on
        draw = rng.random(shape[0])
        on = np.where(on, draw >= ends, draw < begins)
    return out
