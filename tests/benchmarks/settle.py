"""How far the threshold that is settled after training depends on the rows it is settled on.

    python -m tests.benchmarks.settle RUN ... [--samples N]

Each RUN is a finished run whose dictionary reads with a threshold. Fit rows are shuffled as the loader shuffles them, whole
epochs, and cut into disjoint samples of so many rows; each sample settles a threshold as `SAE.settle` does, from batches of
256, 1,024 and 4,096 rows. Printed are the active features per row of confirm, each against their mean over samples of 64
batches of 4,096 rows: the mean difference, its standard deviation, and what 95% of samples stay below, all in percent.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from activations_cache.store import ActivationStore
from sae.base import SAE
from sae.checkpoint import load_sae
from train.run import SPLIT

BATCHES = (256, 1024, 4096)
ROWS = tuple(1 << n for n in range(12, 19))
LOWEST = 0.5
"""Share of the threshold below which no batch's smallest code lies."""


class Values(NamedTuple):
    """Pre-activations over their threshold, by row, where they are above `LOWEST`."""

    value: np.ndarray
    offsets: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of some rows, in any order."""
        first, count = self.offsets[rows], np.diff(self.offsets)[rows]
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        return np.asarray(self.value[np.repeat(first, count) + within])


@torch.inference_mode()
def read(sae: SAE, store: ActivationStore, hook: str, split: str) -> Values:
    """Return what competes on the rows of a split."""
    threshold = sae.threshold
    assert isinstance(threshold, torch.Tensor)
    values, counts = [], []
    for part in store.rows(hook, split, batch_rows=8192):
        ratio = ((torch.from_numpy(part.acts) - sae.b_dec) @ sae.W_enc.T + sae.b_enc) / threshold
        kept = ratio > LOWEST
        values.append(ratio[kept].numpy())
        counts.append(kept.sum(1).numpy())
    return Values(np.concatenate(values), np.concatenate([[0], np.concatenate(counts).cumsum()]))


def smallest(fit: Values, k: int, batch: int, batches: int, rng: np.random.Generator) -> np.ndarray:
    """Return the smallest code that training would keep, of each of so many consecutive batches."""
    order = np.empty(0, dtype=np.int64)
    found = np.empty(batches)
    for i in range(batches):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(fit.rows)])
        values, order = fit.of(order[:batch]), order[batch:]
        assert len(values) > k * batch, "a lower LOWEST is needed"
        found[i] = np.partition(values, len(values) - k * batch)[len(values) - k * batch]
    return found


def show(run: Path, samples: int) -> None:
    store = ActivationStore.open(run / "activations.zarr")
    (folder,) = (path for path in (run / "sae").iterdir() if path.is_dir())
    sae, hook = load_sae(folder), next(iter(store.hooks))
    fit, held = read(sae, store, hook, SPLIT), read(sae, store, hook, "confirm")
    ordered = np.sort(held.value)
    rng = np.random.default_rng(0)
    found = {batch: smallest(fit, sae.config.k, batch, samples * ROWS[-1] // batch, rng) for batch in BATCHES}

    def l0(batch: int, rows: int) -> np.ndarray:
        thresholds = found[batch].reshape(-1, rows // batch).mean(1)
        return np.asarray((len(ordered) - np.searchsorted(ordered, thresholds, side="right")) / held.rows)

    aim = l0(BATCHES[-1], ROWS[-1]).mean()
    print(f"{run.name}: {sae.config.kind}, {fit.rows:,} fit rows, L0 on confirm {aim:.3f}, k {sae.config.k}")
    for rows in ROWS:
        cells = []
        for batch in BATCHES:
            off = 100 * (l0(batch, rows) / aim - 1)
            cells.append(f"{batch}: {off.mean():+.2f} {off.std():.2f} {np.quantile(np.abs(off), 0.95):.2f}")
        print(f"  {rows:>7,} rows   " + "   ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=40, help="of 64 batches of 4,096 rows")
    args = parser.parse_args()
    for run in args.runs:
        show(run, args.samples)


if __name__ == "__main__":
    main()
