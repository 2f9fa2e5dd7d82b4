"""One block of entities, from their traits to their defaults."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .chain import BUCKET, BoolArray, FloatArray, IntArray, simulate_shocks, simulate_states
from .concepts import distractors, minimum_payment, planted
from .config import OUTCOME_MONTHS, ReferenceConfig
from .emission import Card, forbearance, interest_rate, simulate_card
from .hazard import TERMS, Rows, Varying, first_default, mean_log_odds, sigmoid, tilt, true_pd, worsening
from .household import Bureau, Household, days_late, salary_gaps, simulate_bureau, simulate_household
from .macro import Economy
from .population import People, draw_people
from .trailing import trailing_max, trailing_sum
from .truth import latent

BLOCK = 4096


class Block(NamedTuple):
    """Everything about `BLOCK` simulated entities; arrays are [n, horizon] from each first month on."""

    people: People
    time: IntArray
    """Calendar month."""
    mob: IntArray
    states: IntArray
    shock: IntArray
    forb: BoolArray
    rate: FloatArray
    late: FloatArray
    card: Card
    household: Household
    bureau: Bureau
    concepts: dict[str, BoolArray]
    latent: dict[str, BoolArray]
    constant: FloatArray
    varying: FloatArray
    hazard: FloatArray
    default: IntArray
    """Month of default counted from the first, `horizon` for none, [n]."""
    last: IntArray
    """Month of the last row shown, -1 where the entity is not in the book, [n]."""
    shown: BoolArray


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of one purpose: streams of different keys are independent."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *key])))


def simulate_block(config: ReferenceConfig, economy: Economy, index: int) -> Block:
    """Simulate block `index` over the window and the 12 months after it."""
    people = draw_people(generator(config.seed, 1, index), config, BLOCK)
    horizon = config.months + OUTCOME_MONTHS
    age = np.arange(horizon)
    time, mob = people.entry[:, None] + age, people.mob[:, None] + age
    rng = generator(config.seed, 2, index)
    shock = simulate_shocks(rng, BLOCK, horizon, config.shock_rate)
    own = tilt(config, people.theta, people.affordability)[:, None]
    states = simulate_states(rng, worsening(own, economy.u[time], mob, (shock > 0).astype(np.float64)))
    forb, modified = forbearance(rng, states)
    gap = salary_gaps(rng, shock)
    penalty = trailing_max((BUCKET[states] >= 2).astype(np.float64), 12) > 0
    rate = interest_rate(people, mob, economy.policy[time], penalty)
    begins = gap & ~np.concatenate([np.zeros((BLOCK, 1), dtype=np.bool_), gap[:, :-1]], axis=1)
    factor = np.where(forb, 0.5, np.where(modified, 0.75, 1.0))
    card = simulate_card(
        generator(config.seed, 3, index), people, states, rate=rate, due_factor=factor, gap_begins=begins
    )
    rng = generator(config.seed, 4, index)
    household = simulate_household(rng, people, states, shock, gap)
    late = days_late(rng, people, states)
    bureau = simulate_bureau(generator(config.seed, 5, index), people, states, biased=config.world == 2)
    concepts = planted(
        people, states, card, household, bureau, forb=forb, recession=economy.recession[time]
    ) | distractors(generator(config.seed, 6, index), people, states.shape)
    constant, varying = _log_odds(config, people, states, card, bureau, concepts)
    hazard = sigmoid(constant + varying + TERMS["u"] * economy.u[time])
    default = first_default(generator(config.seed, 7, index), states, hazard)
    last, shown = _shown(generator(config.seed, 8, index), config, people, states, default)
    return Block(
        people=people,
        time=time,
        mob=mob,
        states=states,
        shock=shock,
        forb=forb,
        rate=rate,
        late=late,
        card=card,
        household=household,
        bureau=bureau,
        concepts=concepts,
        latent=latent(config, people, states, shock, forb),
        constant=constant,
        varying=varying,
        hazard=hazard,
        default=default,
        last=last,
        shown=shown,
    )


def _log_odds(
    config: ReferenceConfig,
    people: People,
    states: IntArray,
    card: Card,
    bureau: Bureau,
    concepts: dict[str, BoolArray],
) -> tuple[FloatArray, FloatArray]:
    """Return the constant and the varying part of the hazard's log-odds, u aside; both [n, horizon]."""
    varying = Varying(
        util=card.bal / card.lim,
        min_pay=trailing_sum(minimum_payment(card).astype(np.float64), 6),
        income_loss=concepts["income_loss"].astype(np.float64),
        inq_6m=trailing_sum(bureau.inq, 6),
        transactor=concepts["transactor"].astype(np.float64),
        interaction=concepts["util_rising_and_income_loss"].astype(np.float64),
    )
    own = (
        config.hazard_intercept
        + people.theta
        + config.protected_effect * people.protected * (config.world == 3)
    )
    return own[:, None] + TERMS["xor_trades_age"] * concepts["xor_trades_age"], varying.log_odds(states)


def _shown(
    rng: np.random.Generator, config: ReferenceConfig, people: People, states: IntArray, default: IntArray
) -> tuple[IntArray, BoolArray]:
    """Return the last month shown (-1 for an entity outside the book) and which months are rows.

    The last month comes from the window and from attrition, never from what happens after it.
    """
    if config.book == "performing":
        last = np.where(default > people.last, people.last, -1)
    else:
        last = np.minimum(people.last, default - 1)
        # the lost month would show those alone whose last it is, and all of them default in the next
        last -= (people.entry + last == config.outage_month) & (last > 0)
    age = np.arange(states.shape[1])
    chance = config.missing * np.where(BUCKET[states] > 0, config.missing_delinquent_factor, 1.0)
    here = (rng.random(states.shape) >= chance) & (people.entry[:, None] + age != config.outage_month)
    here |= age == last[:, None]
    return last, here & (age <= last[:, None])


def block_pd(config: ReferenceConfig, economy: Economy, block: Block) -> FloatArray:
    """Return the true 12-month PD where it is asked for and nan elsewhere, [n, horizon]."""
    age = np.arange(block.shown.shape[1])
    wanted = block.shown & (age == block.last[:, None]) if config.true_pd == "last" else block.shown
    means = mean_log_odds(block.states, block.shock, block.varying)
    own = np.broadcast_to(
        tilt(config, block.people.theta, block.people.affordability)[:, None], block.states.shape
    )
    rows, columns = np.nonzero(wanted)
    out = np.full(block.shown.shape, np.nan)
    for start in range(0, len(rows), BLOCK):
        pick = (rows[start : start + BLOCK], columns[start : start + BLOCK])
        chosen = Rows(
            state=block.states[pick],
            shock=block.shock[pick],
            month=block.time[pick],
            mob=block.mob[pick],
            tilt=own[pick],
            constant=block.constant[pick],
            varying=block.varying[pick],
        )
        out[pick] = true_pd(chosen, means, economy.u, shock_rate=config.shock_rate)
    return out
