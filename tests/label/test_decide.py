"""Every reason, in its order, from evidence that differs in one respect only."""

import numpy as np
import pytest

from label.confirm import Measure
from label.decide import REASONS, Candidate, Rule, decide
from label.discover import Pair
from label.statistics.bootstrap import Interval
from label.targets import Target

RULE = Rule(min_skill=0.25, min_f1=0.4, max_q=0.01, min_entities=30, always_on=0.95, rival_overlap=0.5)


def measure(skill=0.8, f1=0.8, entities=100, width=0.05):
    figure = Interval(skill, skill - width, skill + width)
    return Measure(
        0.1,
        figure,
        figure,
        figure,
        Interval(f1, f1 - 0.05, f1 + 0.05),
        figure,
        figure,
        entities,
        entities,
        entities,
        5.0,
        np.zeros(3),
    )


def candidate(name="a", rank=0, q=1e-6, **changes):
    return Candidate(Pair(0, Target(name, 1, 1), 0.5, 0.9, 0.8, 0.8, rank), measure(**changes), q)


def decided(candidates=None, rates=(0.1, 0.1), firing=100, clock=None, control=None, overlap=None):
    return decide(
        rates=rates,
        n_entities_firing=firing,
        candidates=[candidate()] if candidates is None else candidates,
        clock=clock,
        control=control,
        overlap=overlap or {},
        rule=RULE,
    )


def test_good_evidence_is_a_label():
    assert decided().reason is None


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("dead", {"rates": (0.0, 0.0), "candidates": []}),
        ("always_on", {"rates": (0.96, 0.5)}),
        ("clock", {"clock": measure(skill=0.9)}),
        ("too_few_entities", {"firing": 29}),
        ("too_few_entities", {"candidates": [candidate(entities=29)]}),
        ("no_association", {"candidates": []}),
        ("not_confirmed", {"candidates": [candidate(skill=0.29)]}),
        ("not_confirmed", {"candidates": [candidate(f1=0.39)]}),
        ("not_confirmed", {"candidates": [candidate(q=0.011)]}),
        ("control", {"control": measure(skill=0.8)}),
        ("rivals", {"candidates": [candidate(), candidate("b", 1, skill=0.78)], "overlap": {1: 0.49}}),
    ],
)
def test_one_fault_gives_its_reason(reason, changes):
    assert decided(**changes).reason == reason
    assert reason in REASONS


def test_the_first_reason_that_applies_is_given():
    everything = {"clock": measure(skill=0.9), "control": measure(skill=0.9), "firing": 3}
    assert decided(rates=(0.99, 0.99), **everything).reason == "always_on"
    assert decided(**everything).reason == "clock"


def test_a_weak_clock_or_control_forbids_nothing():
    assert decided(clock=measure(skill=0.7), control=measure(skill=0.7)).reason is None


def test_rivals_on_the_same_rows_are_listed_but_forbid_nothing():
    found = decided(candidates=[candidate(), candidate("b", 1, skill=0.78)], overlap={1: 0.9})
    assert found.reason is None
    assert [r.pair.target.concept for r in found.rivals] == ["b"]


def test_a_better_concept_on_other_rows_forbids_the_label():
    found = decided(candidates=[candidate(), candidate("b", 1, skill=0.95)], overlap={1: 0.1})
    assert found.reason == "rivals"
    assert [r.pair.target.concept for r in found.rivals] == ["b"]


def test_a_worse_concept_is_no_rival():
    found = decided(candidates=[candidate(), candidate("b", 1, skill=0.6)], overlap={1: 0.0})
    assert found.reason is None
    assert found.rivals == []


def test_confirm_does_not_choose_the_winner():
    found = decided(candidates=[candidate("a", skill=0.4), candidate("b", 1, skill=0.9)], overlap={1: 0.9})
    assert found.winner.pair.target.concept == "a"
