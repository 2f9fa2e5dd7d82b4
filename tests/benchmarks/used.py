"""How often a feature that does no more than its controls passes as used, by the number of entities.

    python -m tests.benchmarks.used [--draws N] [N ...]

Used means that two differences have their interval above zero: over the strongest random direction, and over the mean of ten
matched features. Each has to hold its level by itself, for the other may be exceeded in truth. So the feature's sizes are
drawn as those of one random direction are, the others being nothing, and apart from that as those of ten features with
entities of their own; intervals are those of `label.cause`, from 1,000 bootstraps of entities. Printed is the share of draws
whose interval lies above zero. Nominal is 2.5%, which a percentile interval reaches from above.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from label.statistics.bootstrap import entity_weights, interval

N_MATCHED, N_BOOTSTRAP = 10, 1000

Draw = Callable[[np.random.Generator, int], np.ndarray]

SIZES: dict[str, Draw] = {
    "half normal": lambda rng, n: np.abs(rng.standard_normal(n)),
    "lognormal": lambda rng, n: np.exp(rng.standard_normal(n)),
    "uniform": lambda rng, n: rng.random(n),
    "most near the largest": lambda rng, n: rng.random(n) ** 0.25,
    "a tenth far smaller": lambda rng, n: np.where(rng.random(n) < 0.1, 0.2, 1) * np.exp(0.3 * rng.standard_normal(n)),
}  # fmt: skip
"""Absolute changes of the logit per entity, from skewed to the right to skewed to the left."""


SHARES = (1.0, 0.2)
"""Of the sampled entities, those whose logit moves at all."""


class Rates(NamedTuple):
    """Share of draws in which a difference of expectation zero has its interval above zero."""

    over_random: float
    over_matched: float


def false_rates(sizes: Draw, n: int, *, share: float, draws: int, seed: int = 0) -> Rates:
    """Return both rates with `n` entities that move, a share of those sampled; of other features as many on average."""
    rng = np.random.default_rng([seed, n])
    entities = round(n / share)
    weights = [entity_weights(entities, N_BOOTSTRAP, seed=i) / entities for i in range(1 + N_MATCHED)]
    above = np.zeros((draws, 2), dtype=bool)
    for i in range(draws):
        moved = np.arange(entities) < n
        size, random = sizes(rng, entities) * moved, sizes(rng, entities) * moved
        matched = [sizes(rng, entities) * (rng.random(entities) < share) for _ in range(N_MATCHED)]
        of_matched = np.mean([m @ w for m, w in zip(matched, weights[1:], strict=True)], axis=0)
        over_random = interval(float((size - random).mean()), (size - random) @ weights[0])
        over_matched = interval(float(size.mean() - np.mean(matched)), size @ weights[0] - of_matched)
        above[i] = over_random.low > 0, over_matched.low > 0
    return Rates(*above.mean(0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("entities", nargs="*", type=int, default=[1, 2, 5, 10, 15, 20, 30, 50])
    parser.add_argument("--draws", type=int, default=4000)
    args = parser.parse_args()
    for name, sizes in SIZES.items():
        for n in args.entities:
            cells = []
            for share in SHARES:
                found = false_rates(sizes, n, share=share, draws=args.draws)
                cells.append(f"{share:.0%} move: {found.over_random:.1%} {found.over_matched:.1%}")
            print(f"{name:<22} {n:>3} entities   " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
