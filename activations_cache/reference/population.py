"""Who the entities are: everything about them that does not change."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from .chain import BoolArray, FloatArray, IntArray
from .config import ReferenceConfig

REGIONS = 20
REGION_AUC, MERCHANT_AUC = 0.75, 0.65
INCOME_SD = 0.45
# From the region where the attribute is rarest to where it is commonest: the code itself has no order.
_REGION_CODES = np.array([7, 0, 13, 18, 4, 11, 2, 16, 9, 5, 19, 1, 14, 8, 3, 17, 10, 6, 15, 12])


class People(NamedTuple):
    """One block of entities; every array has shape [n]."""

    theta: FloatArray
    """Hidden frailty, log-odds."""
    trace: FloatArray
    """Frailty in standard deviations: it leaves faint traces in habits, so that a history carries it."""
    protected: BoolArray
    region: IntArray
    merchant_mix: FloatArray
    entry: IntArray
    """Calendar month of the first row."""
    last: IntArray
    """Months from the first row to the last one that would be shown if nothing defaulted."""
    left: BoolArray
    """Whether the last month is the account leaving the book, not the end of the window."""
    mob: IntArray
    """Months on book in the first row."""
    income: FloatArray
    affordability: FloatArray
    """Standardised log income."""
    self_employed: BoolArray
    lim: FloatArray
    taste: FloatArray
    """Shift of the utilisation target in log-odds: people in one state use their limits differently."""
    cash_user: BoolArray
    seasonal: BoolArray
    rounds: BoolArray
    gambles: BoolArray
    statement_day: IntArray
    punctuality: FloatArray
    """Days that are added to every payment date."""
    cushion: FloatArray
    coll: FloatArray
    """Collateral value, nan where unsecured."""
    rate: FloatArray
    teaser: IntArray
    """Months on book until an introductory rate ends, 0 for none."""
    trades: IntArray
    file_age: IntArray
    inq_late: BoolArray


def region_probabilities() -> FloatArray:
    """Return P(region | attribute), shape [2, 20], such that the region tells the attribute with AUC 0.75."""
    place = np.linspace(-1.0, 1.0, REGIONS)
    low, high = 0.0, 5.0
    for _ in range(60):
        tilt = (low + high) / 2
        weights = np.exp(np.outer([-tilt, tilt], place))
        table = weights / weights.sum(axis=1, keepdims=True)
        below = np.cumsum(table[0]) - table[0] / 2
        low, high = (tilt, high) if float(table[1] @ below) < REGION_AUC else (low, tilt)
    result: FloatArray = np.empty((2, REGIONS))
    result[:, _REGION_CODES] = table
    return result


def _tenure(
    rng: np.random.Generator, config: ReferenceConfig, n: int
) -> tuple[IntArray, IntArray, BoolArray, IntArray]:
    """Draw entry month, months to the last row, whether the account leaves, and months on book at entry."""
    vintage = rng.choice(5, n, p=[0.6, 0.1, 0.1, 0.1, 0.1])
    entry = vintage * config.months // 8
    stay = rng.geometric(config.attrition, n) if config.attrition else np.full(n, 10**6)
    end = config.months - 1 - entry
    last = np.minimum(end, stay - 1)
    left = last < end
    lost = (entry + last == config.outage_month) & (last > 0)
    mob = np.where(vintage == 0, rng.integers(0, 60, n), 0)
    return entry, last - lost, left, mob


def draw_people(rng: np.random.Generator, config: ReferenceConfig, n: int) -> People:
    """Draw `n` entities."""
    protected = rng.random(n) < config.protected_share
    cumulative = np.cumsum(region_probabilities(), axis=1)[protected.astype(np.int64), :-1]
    region = (rng.random(n)[:, None] >= cumulative).sum(axis=1)
    shift = np.sqrt(2.0) * float(ndtri(MERCHANT_AUC))
    merchant = 1.0 / (1.0 + np.exp(-rng.normal(0.0, 1.0, n) - shift * protected))
    entry, last, left, mob = _tenure(rng, config, n)
    afford = rng.normal(0.0, 1.0, n) + (np.log(0.9) / INCOME_SD) * protected * (config.world == 1)
    income = np.exp(np.log(2800.0) + INCOME_SD * afford)
    trace = rng.normal(0.0, 1.0, n)
    lim = np.maximum(300.0, 100.0 * np.round(np.exp(rng.normal(np.log(6000.0), 0.8, n)) / 100.0))
    return People(
        theta=config.frailty_sd * trace,
        trace=trace,
        protected=protected,
        region=region,
        merchant_mix=np.round(merchant, 4),
        entry=entry,
        last=last,
        left=left,
        mob=mob,
        income=income,
        affordability=afford,
        self_employed=rng.random(n) < 0.15,
        lim=lim,
        taste=0.2 * trace + rng.normal(0.0, 0.55, n),
        cash_user=rng.random(n) < 0.2,
        seasonal=rng.random(n) < 0.2,
        rounds=rng.random(n) < 0.3,
        gambles=rng.random(n) < 0.12,
        statement_day=rng.integers(1, 29, n),
        punctuality=0.9 * trace + rng.normal(0.0, 2.8, n),
        cushion=income * np.exp(np.log(0.5) - 0.3 * trace + rng.normal(0.0, 0.7, n)),
        coll=np.where(
            rng.random(n) < 0.4, np.round(lim * np.exp(rng.normal(np.log(1.6), 0.4, n)), -2), np.nan
        ),
        rate=np.round(rng.uniform(12.0, 24.0, n), 1),
        teaser=np.where((rng.random(n) < 0.4) & (mob == 0), rng.integers(6, 13, n), 0),
        trades=1 + rng.poisson(3.5, n),
        file_age=mob + np.round(rng.gamma(2.0, 40.0, n)).astype(np.int64),
        inq_late=rng.random(n) < config.inq_missing,
    )
