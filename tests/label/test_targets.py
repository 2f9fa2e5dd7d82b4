"""Concepts as small codes, and the controls that must mean nothing."""

import re

import numpy as np
import pytest

from label.concepts.library import NAME
from label.evidence import rows_of
from label.targets import (
    Target,
    clocks,
    code_concept,
    hash_controls,
    permute_trajectories,
    permuted_controls,
    persistent_controls,
)
from tests.label.builders import make_rows, yes_no

ROWS = {s: make_rows(300, 10, s) for s in ("discover", "confirm")}


def numeric(values):
    n = len(ROWS["discover"])
    known = np.ones(n, dtype=bool)
    return code_concept(
        "c", "concept", {"discover": values, "confirm": values}, dict.fromkeys(ROWS, known), numeric=True
    )


def test_few_distinct_values_get_a_bin_each():
    coded = numeric(np.resize([0.0, 1.0, 2.0, 5.0], 3000))
    assert coded.n_bins == 4
    for code, value in enumerate([0.0, 1.0, 2.0, 5.0]):
        rows = coded.codes["discover"] == code
        assert (np.resize([0.0, 1.0, 2.0, 5.0], 3000)[rows] == value).all()
    assert coded.bounds(Target("c", 1, 1)) == (1.0, 2.0)
    assert coded.bounds(Target("c", 0, 3)) == (None, None)


def test_bins_of_a_continuous_concept_come_from_discover_alone():
    rng = np.random.default_rng(0)
    known = np.ones(3000, dtype=bool)
    a, b = rng.normal(size=3000), rng.normal(size=3000) * 100
    one = code_concept(
        "c", "concept", {"discover": a, "confirm": a}, dict.fromkeys(ROWS, known), numeric=True
    )
    two = code_concept(
        "c", "concept", {"discover": a, "confirm": b}, dict.fromkeys(ROWS, known), numeric=True
    )
    np.testing.assert_array_equal(one.edges, two.edges)
    assert two.codes["confirm"].min() == 0
    assert two.codes["confirm"].max() == two.n_bins - 1


def test_bounds_hold_exactly_the_rows_of_the_bins():
    values = np.random.default_rng(1).lognormal(size=3000)
    coded = numeric(values)
    for low in range(coded.n_bins):
        for high in range(low, coded.n_bins):
            a, b = coded.bounds(Target("c", low, high))
            inside = (values >= (-np.inf if a is None else a)) & (values < (np.inf if b is None else b))
            np.testing.assert_array_equal(coded.truth("discover", Target("c", low, high))[0], inside)


def test_a_spike_at_the_smallest_value_has_a_bin_of_its_own():
    values = np.where(np.random.default_rng(2).random(3000) < 0.6, 0.0, np.random.default_rng(3).random(3000))
    coded = numeric(values)
    assert (values[coded.codes["discover"] == 0] == 0).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.normal(1000, 0.2, 5000),
        lambda rng: rng.lognormal(8, 1, 5000),
        lambda rng: -rng.lognormal(0, 2, 5000),
        lambda rng: np.round(rng.lognormal(4, 1, 5000)),
        lambda rng: np.where(rng.random(5000) < 0.3, 1 / 3, rng.random(5000)),
        lambda rng: rng.integers(0, 40, 5000) / 7,
    ],
)
def test_bins_end_where_few_digits_say_so_and_hold_nearly_what_they_held(draw, monkeypatch):
    values = draw(np.random.default_rng(6))
    known = {"discover": np.ones(len(values), bool)}
    short = code_concept("c", "concept", {"discover": values}, known, numeric=True)
    monkeypatch.setattr("label.targets._MOVED", 0.0)
    exact = code_concept("c", "concept", {"discover": values}, known, numeric=True)
    monkeypatch.setattr("label.targets._shortened", lambda edges, values, keep_first: edges)
    plain = code_concept("c", "concept", {"discover": values}, known, numeric=True)
    np.testing.assert_array_equal(exact.codes["discover"], plain.codes["discover"])
    assert short.n_bins == plain.n_bins
    held = np.bincount(plain.codes["discover"])
    moved = np.bincount(plain.codes["discover"][short.codes["discover"] != plain.codes["discover"]])
    # at either end
    assert (np.pad(moved, (0, len(held) - len(moved))) <= 0.02 * held).all()
    digits = [sum(len(repr(float(e)).strip("-0.")) for e in c.edges[1:-1]) for c in (short, exact, plain)]
    assert digits[0] <= digits[1] <= digits[2]


def test_unknown_rows_never_count_as_false():
    known = np.random.default_rng(4).random(3000) < 0.5
    truth = np.random.default_rng(5).random(3000) < 0.5
    coded = yes_no("c", truth, known)
    holds, applies = coded.truth("discover", Target("c", 1, 1))
    np.testing.assert_array_equal(applies, known)
    assert not holds[~known].any()


def test_hash_bits_are_constant_within_an_entity_and_unlike_each_other():
    controls = hash_controls(ROWS, [f"E{i}" for i in range(300)], seed=0)
    for c in controls:
        by_entity = c.codes["discover"].reshape(300, 10)
        assert (by_entity == by_entity[:, :1]).all()
    halves = [c.codes["discover"] for c in controls if abs(c.codes["discover"].mean() - 0.5) < 0.1]
    assert len(halves) == 2
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.2


def test_persistent_controls_match_prevalence_and_persistence_and_are_independent():
    rng = np.random.default_rng(6)
    truth = np.empty((300, 10), dtype=bool)
    truth[:, 0] = rng.random(300) < 0.2
    for t in range(1, 10):
        truth[:, t] = np.where(rng.random(300) < 0.7, truth[:, t - 1], rng.random(300) < 0.2)
    concept = yes_no("c", truth.ravel())
    control = persistent_controls(ROWS, [concept], seed=0)[0].codes["discover"].reshape(300, 10) == 1
    assert control.mean() == pytest.approx(truth.mean(), abs=0.04)
    stay = [np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1] for x in (truth, control)]
    assert stay[0] == pytest.approx(stay[1], abs=0.08)
    assert abs(np.corrcoef(truth.ravel(), control.ravel())[0, 1]) < 0.1


def test_permuted_controls_keep_each_trajectory_whole():
    truth = np.random.default_rng(7).random(3000) < 0.3
    control = permuted_controls(ROWS, [yes_no("c", truth)], seed=0)[0].codes["discover"].reshape(300, 10)
    originals = {tuple(row) for row in truth.reshape(300, 10).astype(int)}
    assert all(tuple(row) in originals for row in control)
    assert (control == truth.reshape(300, 10)).all(1).mean() < 0.1


def test_no_concept_can_have_the_name_of_a_control():
    concept = yes_no("debt", np.random.default_rng(8).random(3000) < 0.3)
    controls = [
        *clocks(ROWS),
        *hash_controls(ROWS, [f"E{i}" for i in range(300)], seed=0),
        *persistent_controls(ROWS, [concept], seed=0),
        *permuted_controls(ROWS, [concept], seed=0),
    ]
    assert len(controls) == 13
    assert not [c.id for c in controls if re.fullmatch(NAME, c.id)]


def test_clocks_are_position_time_and_the_start_of_the_history():
    rng = np.random.default_rng(9)
    entity, position = np.repeat(np.arange(300), 10), np.tile(np.arange(10), 300)
    start = np.repeat(rng.integers(0, 8, 300), 10)
    # after a gap, position lags behind time; the first rows of a history need not be here
    gap = (position >= 6) & (entity % 3 == 0)
    here = (position >= 4) | (entity % 2 == 0)
    given = (a[here] for a in (entity, start + position + 5 * gap, position))
    rows = {"discover": rows_of("discover", *given)[0]}
    found = {c.id: c for c in clocks(rows)}
    assert set(found) == {"clock:position", "clock:time", "clock:start"}
    assert all(c.family == "clock" for c in found.values())
    np.testing.assert_array_equal(found["clock:start"].codes["discover"], start[here])
    np.testing.assert_array_equal(found["clock:position"].codes["discover"], position[here])


def test_permutations_do_not_depend_on_the_unit_of_time():
    rng = np.random.default_rng(10)
    entity, time = np.repeat(np.arange(2000), 12), np.tile(np.arange(12), 2000)
    here = rng.random(len(time)) < 0.6
    sources = []
    for unit in (1, 30 * 86_400 * 10**9):
        rows, _ = rows_of("discover", entity[here], time[here] * unit, time[here])
        sources.append(permute_trajectories(rows, np.random.default_rng(0)))
    found = sources[0] >= 0
    np.testing.assert_array_equal(*sources)
    np.testing.assert_array_equal(rows.time[sources[0]][found], rows.time[found])
    assert found.mean() == pytest.approx(0.6, abs=0.02)
