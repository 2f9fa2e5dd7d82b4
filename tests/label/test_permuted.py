"""Pairs against their own permutations: what the calendar explains is not found, what entities share is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from label.discover import Pair
from label.evidence import Rows, rows_of
from label.permuted import permuted_statistics
from label.statistics.score_test import (
    EntitySums,
    Null,
    benjamini_hochberg,
    calibration,
    p_values,
    score_statistic,
)
from label.targets import Coded, Target, permute_trajectories
from tests.label.builders import make_evidence, make_rows, yes_no


def pair_of(feature: int, concept: str, low: int = 1, high: int = 1, threshold: float = 0.0) -> Pair:
    return Pair(feature, Target(concept, low, high), threshold, 1.0, 1.0, 1.0, 0)


def directly(evidence, concept, pair, sources):
    """Row by row, from the definitions alone."""
    rows, out = evidence.rows, []
    fires = np.zeros(len(rows), bool)
    row, value = evidence.of(pair.feature)
    fires[row[value > pair.threshold]] = True
    for source in sources:
        codes = np.where(source >= 0, concept.codes[rows.split][source], -1)
        known, holds = codes >= 0, (codes >= pair.target.low) & (codes <= pair.target.high)
        masks = (fires & holds, fires & known, holds, known)
        per = [np.array([m[rows.member == e].sum() for e in range(rows.n_entities)], float) for m in masks]
        out.append(score_statistic(EntitySums(*per)))
    return np.array(out)


def uneven(rng) -> Rows:
    """Histories of different lengths that begin at different times."""
    length, start = rng.integers(1, 9, 40), rng.integers(0, 6, 40)
    entity = np.repeat(np.arange(40), length)
    position = np.concatenate([np.arange(n) for n in length])
    rows, _ = rows_of("confirm", entity, position + start[entity], position)
    return rows


@pytest.mark.parametrize("at_once", [2, 100])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_statistics_are_those_of_their_definition(seed, at_once):
    rng = np.random.default_rng(seed)
    rows = uneven(rng)
    dense = (rng.random((len(rows), 4)) * (rng.random((len(rows), 4)) < [0.5, 0.1, 1.0, 0.0])).astype(
        np.float32
    )
    evidence = make_evidence(dense, rows)
    concepts = {
        "bit": yes_no("bit", rng.random(len(rows)) < 0.3, rng.random(len(rows)) < 0.8),
        "bins": Coded(
            "bins", "concept", np.arange(7.0), {"confirm": rng.integers(-1, 6, len(rows)).astype(np.int8)}
        ),
    }
    pairs = [pair_of(f, "bit", threshold=t) for f in range(4) for t in (0.0, 0.4)]
    pairs += [
        pair_of(f, "bins", low, high) for f in range(4) for low, high in ((0, 0), (1, 3), (4, 5), (0, 5))
    ]
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("label.permuted._BYTES_OF_SOURCES", at_once * 4 * len(rows))
        got = permuted_statistics(evidence, concepts, pairs, n_permutations=3, seed=7, report=done.append)
    assert done == sorted(done) and done[-1] == 3
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([7, 4])))
    sources = [permute_trajectories(rows, draws) for _ in range(3)]
    for i, pair in enumerate(pairs):
        concept = concepts[pair.target.concept]
        assert got.statistics[:, i] == pytest.approx(directly(evidence, concept, pair, sources), abs=1e-6), (
            pair
        )
        codes = concept.codes["confirm"]
        there = [((s >= 0) & (codes[s] >= 0)).sum() / (codes >= 0).sum() for s in sources]
        assert got.kept[i] == pytest.approx(np.mean(there))


@pytest.fixture(scope="module")
def calendar() -> tuple[list[str], np.ndarray, Null]:
    """Features and concepts that follow the calendar, and others that entities share, on 300 entities."""
    rng = np.random.default_rng(4)
    rows = make_rows(300, 12, "confirm")
    late = np.isin(rows.time, (9, 10, 11))

    def seasonal(n: int) -> np.ndarray:
        return rng.random((len(rows), n)) < np.where(late, 0.6, 0.05)[:, None]

    def particular(n: int) -> np.ndarray:
        return (rng.random((300, n)) < 0.3)[rows.member] & (rng.random((len(rows), n)) < 0.5)

    truth = particular(20)
    named = {
        "calendar": (seasonal(20), seasonal(20)),
        "nothing": (particular(20), particular(20)),
        "weak": (truth & (rng.random(truth.shape) < 0.1) | (rng.random(truth.shape) < 0.1), truth),
    }
    fires = np.concatenate([f for f, _ in named.values()], axis=1)
    holds = np.concatenate([h for _, h in named.values()], axis=1)
    evidence = make_evidence(fires.astype(np.float32), rows)
    concepts = {str(i): yes_no(str(i), holds[:, i]) for i in range(holds.shape[1])}
    pairs = [pair_of(i, str(i)) for i in range(holds.shape[1])]
    null = permuted_statistics(evidence, concepts, pairs, n_permutations=200, seed=0)
    sums = []
    for i in range(holds.shape[1]):
        f, h = fires[:, i], holds[:, i]
        per = [np.bincount(rows.member, weights=m, minlength=300) for m in (f & h, f, h, np.ones(len(f)))]
        sums.append(score_statistic(EntitySums(*per)))
    return [name for name in named for _ in range(20)], np.array(sums), null


def test_what_the_calendar_explains_is_not_found(calendar):
    names, statistic, null = calendar
    seasonal = np.array(names) == "calendar"
    plain = norm.sf(statistic[seasonal])
    assert (plain < 1e-6).all()
    assert (p_values(statistic, null)[seasonal] < 0.05).mean() <= 0.15


def test_it_costs_the_other_pairs_of_the_run_nothing(calendar):
    names, statistic, null = calendar
    found = calibration(null)
    assert found.plain > 0.3
    assert found.rejected < 0.06
    q = benjamini_hochberg(p_values(statistic, null, found.inflation))
    weak, nothing = np.array(names) == "weak", np.array(names) == "nothing"
    assert (q[weak] < 0.01).mean() > 0.8
    assert not (q[nothing] < 0.01).any()
    # one width for all pairs, taken from the tail of all: the strongest find of the run would be lost in it
    width = np.quantile(null.statistics, 0.95) / norm.isf(0.05)
    assert norm.sf(statistic[weak].max() / width) > 0.01
