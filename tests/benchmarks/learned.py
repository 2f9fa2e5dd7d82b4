"""How many labels count as learned where nothing was, and where something was.

    python -m tests.benchmarks.learned [--seeds N]

Variables, columns and features are drawn, and labelled by `label.labelling` itself. A variable differs by entity and by
row; features tile it (triangles at places and of widths of their own) or are its tails. Printed is how many labels of the
variable exceed the best feature of a twin's dictionary, and the best raw column, as `learned` requires.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from label.baselines import ColumnDetector, best_twin_features
from label.concepts.library import ConceptInfo
from label.config import LabelConfig
from label.confirm import Confirm, Measure, detector_of
from label.discover import Pair
from label.inputs import LabelInputs, Material
from label.labelling import Labelling
from label.statistics.bootstrap import entity_weights, interval
from label.statistics.counts import Levels
from label.targets import Target, code_concept
from tests.label.builders import make_evidence, make_rows

N_ENTITIES, LENGTH, N_TILES = 1500, 8, 12
ROWS = {split: make_rows(N_ENTITIES, LENGTH, split) for split in ("discover", "confirm")}
CONFIG = LabelConfig(n_bootstrap=200, n_permutations=10)

Values = dict[str, np.ndarray]
"""One number a row, or one of every feature, of each split."""


class Simulated(Labelling):
    """A labelling of one numeric concept, `c`, beside raw columns that are given."""

    def __init__(self, concept: Values, dense: Values, twin: Values, columns: dict[str, Values]) -> None:
        known = {s: np.ones(len(r), dtype=bool) for s, r in ROWS.items()}
        material = Material(
            {s: make_evidence(x.astype(np.float32), ROWS[s]) for s, x in dense.items()},
            {s: make_evidence(x.astype(np.float32), ROWS[s]) for s, x in twin.items()},
            [code_concept("c", "concept", concept, known, numeric=True)],
            {"c": False},
            [f"E{i}" for i in range(N_ENTITIES)],
        )
        info = ConceptInfo(id="c", text="c", kind="point", type="float")
        inputs = LabelInputs(store=Path("store"), sae=Path("sae"), hook="h", tables=[(Path("t"), [info])])
        super().__init__(inputs, material, CONFIG, seed=0, report=lambda *_: None)
        self.columns = columns
        self.discover()
        self.confirm_pairs()
        self.compare()

    def raw(self, split: str) -> tuple[list[str], np.ndarray]:
        """Return the names and values of the raw columns."""
        return [*self.columns], np.stack([v[split] for v in self.columns.values()], axis=1)


def variable(rng: np.random.Generator) -> Values:
    """Draw a number that differs by entity (deviation 1) and by row (0.7)."""
    shape = (N_ENTITIES, LENGTH)
    return {s: (rng.normal(size=(N_ENTITIES, 1)) + 0.7 * rng.normal(size=shape)).ravel() for s in ROWS}


def with_noise(x: Values, noise: float, rng: np.random.Generator) -> Values:
    """Add noise of that deviation."""
    return {s: v + noise * rng.normal(size=v.shape) for s, v in x.items()}


def tiles(x: Values, noise: float, rng: np.random.Generator) -> Values:
    """Draw features that fire about places of their own, each with noise of its own."""
    at, width = 1.2 * rng.normal(size=N_TILES), rng.uniform(0.15, 0.5, N_TILES)
    seen = with_noise({s: np.tile(v[:, None], N_TILES) for s, v in x.items()}, noise, rng)
    return {s: np.maximum(1 - np.abs(v - at) / width, 0) for s, v in seen.items()}


def tails(x: Values, rng: np.random.Generator) -> Values:
    """Draw features that rise, or fall, from places of their own."""
    at, sign = 1.2 * rng.normal(size=N_TILES), rng.choice([-1, 1], N_TILES)
    return {s: np.maximum(sign * (v[:, None] - at), 0) for s, v in x.items()}


def exceeds(mine: Measure, other: Measure) -> bool:
    """Return whether the paired interval of the difference in skill lies above zero."""
    return interval(mine.skill.value - other.skill.value, mine.skill_draws - other.skill_draws).low > 0


def over_twin(work: Simulated) -> list[list[bool]]:
    """Return per label: between two values, exceeds the twin on its interval, by the rule, on any range of the twin's."""
    assert work.twin is not None
    # an open target is held against ranges of any kind
    opening = Target("c", 0, 0)
    levels = Levels.of(work.twin["discover"])
    best = best_twin_features(levels, work.by_id, [opening], min_entities=CONFIG.min_entities)[opening][1]
    pair = Pair(best.feature, best.target, best.threshold, 0.0, best.skill, 0.0, 0)
    anywhere = work.confirm.measure(detector_of(work.twin["confirm"], pair), best.target)
    out = []
    for j in work.labelled():
        target, mine = work.decisions[j].winner.pair.target, work.decisions[j].winner.measure
        first = exceeds(mine, work.compared[target].twins[0][1])
        middle = None not in work.by_id["c"].bounds(target)
        by_rule = work.learned(j).over_twin.low > 0
        out.append([middle, first, by_rule, first and exceeds(mine, anywhere)])
    return out


def without_near(
    found: ColumnDetector, at_discover: Confirm, target: Target, column: np.ndarray
) -> ColumnDetector:
    """Return the best reading of the same column on discover, but for nearness."""
    if found.shape != "near":
        return found
    readings = [found._replace(shape=shape) for shape in ("rising", "falling", "interval")]
    return max(readings, key=lambda d: at_discover.measure(d.on(column), target).skill.value)


def over_raw(work: Simulated) -> list[list[bool]]:
    """Return per label: exceeds the only raw column read in every way but nearness, and by the rule."""
    (column,) = work.columns.values()
    weights = entity_weights(N_ENTITIES, 2, seed=0)
    at_discover = Confirm(ROWS["discover"], work.by_id, weights, split="discover")
    out = []
    for j in work.labelled():
        target, mine = work.decisions[j].winner.pair.target, work.decisions[j].winner.measure
        plain = without_near(work.compared[target].column, at_discover, target, column["discover"])
        other = work.confirm.measure(plain.on(column["confirm"]), target)
        out.append([exceeds(mine, other), work.learned(j).over_raw.low > 0])
    return out


def blunt(x: Values, rng: np.random.Generator) -> Values:
    """Draw tiles of the variable with noise that all of them share."""
    return tiles(with_noise(x, 0.6, rng), 0.05, rng)


def one_sharp(x: Values, rng: np.random.Generator) -> Values:
    """Draw the same, but for one of the features."""
    twin, sharp = blunt(x, rng), tiles(x, 0.0, rng)
    return {s: np.hstack([v[:, :-1], sharp[s][:, -1:]]) for s, v in twin.items()}


TWINS: dict[str, Callable[[Values, np.random.Generator], Values]] = {
    "features of the same recipe": lambda x, rng: tiles(x, 0.05, rng),
    "tails, which know its ends alone": tails,
    "blunt features": blunt,
    "blunt features and a sharp one": one_sharp,
}


def beside_twin(twin: Callable[[Values, np.random.Generator], Values], seed: int) -> list[list[bool]]:
    """Label features that tile a variable, beside a twin of it."""
    rng = np.random.default_rng(seed)
    x = variable(rng)
    return over_twin(Simulated(x, tiles(x, 0.05, rng), twin(x, rng), {"x": x}))


def beside_column(noise: float, seed: int) -> list[list[bool]]:
    """Label features that tile a raw column by a concept that is the column with noise."""
    rng = np.random.default_rng(seed)
    column = variable(rng)
    features = tiles(column, 0.0, rng)
    return over_raw(Simulated(with_noise(column, noise, rng), features, features, {"x": column}))


def of_sum(seed: int) -> list[list[bool]]:
    """Label features that tile x + y, beside the columns x and y and a twin that knows the ends of x + y."""
    rng = np.random.default_rng(seed)
    x, y = variable(rng), variable(rng)
    both = {s: (x[s] + y[s]) / np.sqrt(2) for s in ROWS}
    work = Simulated(both, tiles(both, 0.05, rng), tails(both, rng), {"x": x, "y": y})
    learned = [work.learned(j) for j in work.labelled()]
    return [[v.over_raw.low > 0, v.over_twin.low > 0, bool(v.verdict)] for v in learned]


def row(name: str, cells: Sequence[object]) -> None:
    """Print one row of a table."""
    print(f"{name:<38}" + "".join(f"{cell!s:>18}" for cell in cells), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    seeds = range(parser.parse_args().seeds)
    row("a twin that has", ["labels", "between values", "on the interval", "by the rule", "on any range"])
    for name, twin in TWINS.items():
        found = np.array([label for seed in seeds for label in beside_twin(twin, seed)])
        row(name, [len(found), *found.sum(0)])
    print()
    row("a column of which the concept is", ["labels", "without near", "by the rule"])
    for noise in (0.0, 0.1, 0.3, 0.6):
        found = np.array([label for seed in seeds for label in beside_column(noise, seed)])
        row(f"the value, with noise of {noise}", [len(found), *found.sum(0)])
    print()
    row("features that know", ["labels", "over the columns", "over the twin", "learned"])
    found = np.array([label for seed in seeds for label in of_sum(seed)])
    row("x + y", [len(found), *found.sum(0)])


if __name__ == "__main__":
    main()
