"""The rule that turns evidence into a label, or into the first reason against one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from .confirm import Measure
from .discover import Pair

Reason = Literal[
    "dead",
    "always_on",
    "clock",
    "too_few_entities",
    "no_association",
    "not_confirmed",
    "control",
    "rivals",
]

REASONS: dict[Reason, str] = {
    "dead": "it fires neither on discover nor on confirm",
    "always_on": "it fires almost always",
    "clock": "a clock (position in the history, its start, calendar time) explains it better than any concept",
    "too_few_entities": "it fires on, or its concept holds for, too few entities",
    "no_association": "no concept goes with it on the discovery entities",
    "not_confirmed": "its concept did not hold up on the confirmation entities",
    "control": "a signal that means nothing explains it as well",
    "rivals": "another concept, which differs, explains it as well or better",
}


class Rule(NamedTuple):
    """What a label must reach on confirm."""

    min_skill: float
    min_f1: float
    max_q: float
    min_entities: int
    always_on: float
    rival_overlap: float


class Candidate(NamedTuple):
    """A pair with what confirm said of it."""

    pair: Pair
    measure: Measure
    q: float
    """BH-adjusted over all pairs that went to confirm."""


class Decision(NamedTuple):
    """A feature's status: labelled with `winner`, or not, for `reason`."""

    reason: Reason | None
    winner: Candidate | None
    """The feature's best concept on discover, labelled or not."""
    rivals: list[Candidate]
    """Other concepts whose skill on confirm cannot be told from the winner's, or is above it."""


def passes(candidate: Candidate, rule: Rule) -> bool:
    """Return whether the association of a candidate holds on confirm."""
    m = candidate.measure
    return m.skill.low >= rule.min_skill and m.f1.value >= rule.min_f1 and candidate.q <= rule.max_q


def enough_entities(measure: Measure, rule: Rule) -> bool:
    """Return whether both sides of the concept, and the feature's firing, rest on enough entities."""
    return min(measure.n_entities, measure.n_entities_without, measure.n_entities_firing) >= rule.min_entities


def decide(
    *,
    rates: tuple[float, float],
    n_entities_firing: int,
    candidates: Sequence[Candidate],
    clock: Measure | None,
    control: Measure | None,
    overlap: dict[int, float],
    rule: Rule,
) -> Decision:
    """Decide one feature.

    The winner is chosen on discover alone (highest skill there), so nothing on confirm has chosen what it scores.

    Parameters
    ----------
    rates
        Share of rows on which it fires, on discover and on confirm.
    n_entities_firing
        Entities on which it fires on discover, any value.
    candidates
        Its concepts that went to confirm, best on discover first.
    clock, control
        As confirm measured them: the clock that is best on discover, and of the negative controls that are, one of
        each kind, the strongest.
    overlap
        Index in `candidates` -> Jaccard overlap of its rows on discover with the winner's.
    """
    winner = candidates[0] if candidates else None
    rivals = [] if winner is None else [c for c in candidates[1:] if _as_good(c, winner)]
    reason = _reason(rates, n_entities_firing, winner, clock, control, rule)
    if reason is None:
        apart = [
            i
            for i, c in enumerate(candidates)
            if i and winner is not None and _as_good(c, winner) and overlap[i] < rule.rival_overlap
        ]
        reason = "rivals" if apart else None
    return Decision(reason, winner, rivals)


def _reason(
    rates: tuple[float, float],
    n_entities_firing: int,
    winner: Candidate | None,
    clock: Measure | None,
    control: Measure | None,
    rule: Rule,
) -> Reason | None:
    skill = -np.inf if winner is None else winner.measure.skill.value
    few = n_entities_firing < rule.min_entities
    checks: list[tuple[Reason, bool]] = [
        ("dead", max(rates) == 0),
        ("always_on", max(rates) > rule.always_on),
        ("clock", clock is not None and clock.skill.low >= rule.min_skill and clock.skill.value > skill),
        ("too_few_entities", few or (winner is not None and not enough_entities(winner.measure, rule))),
        ("no_association", winner is None),
        ("not_confirmed", winner is not None and not passes(winner, rule)),
        ("control", control is not None and control.skill.value >= skill),
    ]
    return next((reason for reason, holds in checks if holds), None)


def _as_good(rival: Candidate, winner: Candidate) -> bool:
    return rival.measure.skill.high >= winner.measure.skill.low
