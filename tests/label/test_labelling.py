"""What a labelling says of its features beside the untrained twin, and of concepts that were compared with none."""

from pathlib import Path

import numpy as np
import pytest

from label import records
from label.concepts.library import ConceptInfo
from label.config import LabelConfig
from label.inputs import LabelInputs, Material
from label.labelling import Labelling
from label.targets import Target, code_concept
from tests.label.builders import make_evidence, make_rows

SPLITS = ("discover", "confirm")
LENGTH, N_ENTITIES = 6, 500
NO_RANGE = (
    "no range of it was found that holds, and fails, on enough entities of discover and holds on at most 95% of the rows "
    "there to which it applies"
)


def compared(dense, values, twin=None):
    """A labelling, compared with the twin's; concepts of truth values are yes-or-no ones, the others numeric (or NaN)."""
    rows = {s: make_rows(N_ENTITIES, LENGTH, s) for s in SPLITS}
    known = {name: {s: np.isfinite(x) for s, x in v.items()} for name, v in values.items()}
    numeric = {name: v["discover"].dtype != bool for name, v in values.items()}
    concepts = [code_concept(n, "concept", v, known[n], numeric=numeric[n]) for n, v in values.items()]
    infos = [ConceptInfo(id=n, text=n, kind="point", type="float" if numeric[n] else "bool") for n in values]
    ids = [f"E{i}" for i in range(N_ENTITIES)]
    material = Material(
        {s: make_evidence(x, rows[s]) for s, x in dense.items()},
        None if twin is None else {s: make_evidence(x, rows[s]) for s, x in twin.items()},
        concepts,
        dict.fromkeys(values, False),
        ids,
    )
    inputs = LabelInputs(store=Path("store"), sae=Path("sae"), hook="h", tables=[(Path("t"), infos)])
    config = LabelConfig(n_bootstrap=100, n_permutations=10)
    work = Labelling(inputs, material, config, seed=0, report=lambda *_: None)
    work.discover()
    work.confirm_pairs()
    work.compare()
    return work


def variable(seed=0):
    """A number that differs by entity and by row."""
    rng = np.random.default_rng(seed)
    shape = (N_ENTITIES, LENGTH)
    return {s: (rng.normal(size=(N_ENTITIES, 1)) + 0.7 * rng.normal(size=shape)).ravel() for s in SPLITS}


def tiles(x, seed):
    """Features that fire about places of their own."""
    rng = np.random.default_rng(seed)
    at, width = rng.normal(size=12) * 1.2, rng.uniform(0.15, 0.5, 12)
    return {s: np.maximum(1 - np.abs((v[:, None] - at) / width), 0) for s, v in x.items()}


def tails(x, seed):
    """Features that rise, or fall, from places of their own."""
    rng = np.random.default_rng(seed)
    at, sign = rng.normal(size=12) * 1.2, rng.choice([-1, 1], 12)
    return {s: np.maximum(sign * (v[:, None] - at), 0) for s, v in x.items()}


def over_twin(work):
    return [work.learned(j).over_twin.low > 0 for j in work.labelled()]


def test_a_twin_of_the_same_kind_is_seldom_exceeded():
    """Both tile one variable, each at its own places, and neither learned anything."""
    exceeded = []
    for seed in range(3):
        x = variable(seed)
        one, other = tiles(x, 100 + seed), tiles(x, 200 + seed)
        exceeded += over_twin(compared(one, {"x": x}, twin=other))
    assert len(exceeded) >= 25
    assert np.mean(exceeded) <= 0.15


def test_a_twin_without_ranges_of_that_kind_is_exceeded():
    """The ends of a variable are easier than its middle, so a twin that knows its ends does not know its middle."""
    x = variable()
    work = compared(tiles(x, 100), {"x": x}, twin=tails(x, 200))
    assert len(work.labelled()) >= 8
    assert np.mean(over_twin(work)) >= 0.6


def test_the_record_shows_the_twin_that_is_exceeded_least_surely():
    x = variable()
    work = compared(tiles(x, 100), {"x": x, "high": {s: v > 1 for s, v in x.items()}}, twin=tiles(x, 200))
    for j in work.labelled():
        target, record = work.decisions[j].winner.pair.target, records.feature(work, j)
        twins = work.compared[target].twins
        assert len(twins) == (2 if target.concept == "x" else 1)
        for twin, _ in twins[1:]:
            assert None in work.by_id["x"].bounds(target) or None not in work.by_id["x"].bounds(twin.target)
        strongest = max(measure.skill.value for _, measure in twins)
        assert record["over_twin"] == pytest.approx(record["skill"] - record["twin_skill"])
        assert record["twin_skill"] == pytest.approx(strongest, abs=0.05)


def test_p_values_are_those_of_the_pairs():
    x = variable()
    work = compared(tiles(x, 100), {"x": x})
    for i, pair in enumerate(work.pairs):
        if pair.target.concept == "x" and pair.rank == 0:
            assert records.feature(work, pair.feature)["p_value"] == work.p[i]


def test_a_concept_that_was_compared_with_nothing_says_why():
    rng = np.random.default_rng(0)
    late = {s: rng.random(N_ENTITIES * LENGTH) < 0.03 for s in SPLITS}
    few = {s: np.arange(N_ENTITIES * LENGTH) < 20 * LENGTH for s in SPLITS}
    both = {s: late[s] * np.where(np.arange(N_ENTITIES * LENGTH) % 2, 1.0, -1.0) for s in SPLITS}
    # either end alone holds for too few entities, and so fails all but the middle with one of them
    scarce = {s: np.where(np.cumsum(late[s]) <= 40, both[s], 0.0) for s in SPLITS}
    values = {"current": {s: ~v for s, v in late.items()}, "few": few, "scarce": scarce, "late": late}
    dense = {s: late[s][:, None] * (1 + rng.random((N_ENTITIES * LENGTH, 1))) for s in SPLITS}
    work = compared(dense, values)
    found = {c["concept"]: c.get("reason") for c in records.concepts(work)}
    assert found == {
        "current": "it holds on more than 95% of the rows of discover to which it applies",
        "few": "it holds, or fails, on too few entities of discover",
        "scarce": NO_RANGE,
        "late": None,
    }
    assert work.best_of_concept["late"].target == Target("late", 1, 1)


def test_a_range_that_no_feature_grew_to_is_not_said_to_hold_almost_always():
    """Twelve values of five entities each: a range of six has enough on either side, and the feature knows one value."""
    entity = np.repeat(np.arange(N_ENTITIES), LENGTH)
    values = {s: np.where(entity < 60, entity // 5, np.nan) for s in SPLITS}
    dense = {s: (v == 3)[:, None] * 1.0 for s, v in values.items()}
    work = compared(dense, {"x": values})
    half = entity[values["discover"] < 6]
    assert len(np.unique(half)) == work.config.min_entities == 30
    (record,) = records.concepts(work)
    assert record["reason"] == NO_RANGE
