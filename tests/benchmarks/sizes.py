"""What `sae.d_sae: auto` and `sae.k: auto` take, next to what is known or what a sweep finds.

    python -m tests.benchmarks.sizes planted [--train] | clouds | stores STORE ... [--hooks HOOK ...] [--ks K ...]

Settled before the sweeps were run, with older figures of UCI and the quickstart known: where the truth is planted, k is the
mean number of active directions and d_sae the number of directions. On other rows k is the smallest of 2, 4, 8, 16, 32 at
which twice as much lowers FVU by less than 0.01 (at 512 features), and d_sae the smallest of 64, 128, 256, 512 at which
twice as much lowers FVU by less than a tenth of itself, or leaves more than a fifth of the features silent (at that k).
FVU and features that fire are on 20,000 rows of `confirm`; each dictionary is a BatchTopK trained on 300,000 rows, all else
automatic. Wider activations need other numbers (`--ks`, `--widths`; widths of at most k are left out) and time (`--rows`).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import sae.architectures  # noqa: F401 - registers the kinds
from activations_cache.store import ActivationStore
from sae.base import SAEConfig
from sae.sizing import independent_directions, principal_components, spectrum, suggest_sizes
from tests.benchmarks.recovery import Planted, train
from train.plan import TrainConfig
from train.trainer import SAMPLE_ROWS

PLANTED = [(768, 10, "uniform"), (768, 10, "zipf")]
"""Directions, L0 and rates by which the rule was fitted."""

HELD_OUT = [
    (768, 5, "uniform"),
    (768, 20, "uniform"),
    (256, 10, "uniform"),
    (2000, 10, "uniform"),
    (768, 5, "zipf"),
    (768, 20, "zipf"),
]
SEEDS = (0, 1, 2)
ROWS = 300_000
WIDE = 512
WORTH_K, WORTH_WIDTH, MOST_SILENT = 0.01, 0.1, 0.2


def suggested(x: torch.Tensor) -> dict[str, object]:
    """Say what a sample supports, and the numbers that this follows from."""
    variances = spectrum(x)
    sizes, directions = suggest_sizes(x), independent_directions(x, variances)
    return {
        "k": sizes.k,
        "d_sae": sizes.d_sae,
        "told_by": sizes.told_by,
        "effective_rank": round(sizes.effective_rank, 1),
        "components_90_95": [principal_components(variances, share) for share in (0.9, 0.95)],
        "per_row": round(directions.per_row, 2),
        "directions": round(directions.total, 1),
        "of_cloud": round(directions.total / directions.cloud, 2),
    }


def planted(*, trained: bool) -> None:
    """Compare with planted truth; with `trained`, also what TopK finds with the rule's and the true numbers."""
    for n, l0, rates in PLANTED + HELD_OUT:
        for seed in SEEDS:
            data = Planted(rates, seed, n_directions=n, l0=l0)
            found = suggested(data.next(SAMPLE_ROWS))
            record = {"directions": n, "l0": l0, "rates": rates, "seed": seed, "suggested": found}
            if trained and seed == 0:
                given = {"truth": (n, l0), "suggested": (found["d_sae"], found["k"])}
                record["found"] = {name: recovered(data, *numbers) for name, numbers in given.items()}
            print(json.dumps(record), flush=True)


def recovered(data: Planted, d_sae: int, k: int) -> float:
    """Return the share of the directions that a dictionary finds with a cosine above 0.9."""
    config = SAEConfig.model_validate({"kind": "topk", "d_sae": d_sae, "k": k})
    dictionary = train(config, TrainConfig(rows=2 * ROWS), data.next)[0]
    best = (dictionary.W_dec.detach() @ data.directions.T).max(0).values
    return round(float((best > 0.9).float().mean()), 3)


def clouds() -> None:
    """Say how often rows of one Gaussian shape and varying norms are taken for sparse sums."""
    for d_in, decay, spread in itertools.product((32, 128), (0, 1), (0.1, 0.15, 0.2, 0.3)):
        scales = torch.arange(1, d_in + 1) ** (-decay / 2)
        found = []
        for seed in range(15):
            rng = torch.Generator().manual_seed(seed)
            norms = 1 + spread * torch.randn(SAMPLE_ROWS, 1, generator=rng)
            found.append(suggested(norms * torch.randn(SAMPLE_ROWS, d_in, generator=rng) * scales))
        record = {"d_in": d_in, "decay": decay, "spread": spread}
        record["of_cloud"] = sorted(f["of_cloud"] for f in found)
        print(
            json.dumps({**record, "from_moments": sum(f["told_by"] == "fourth moments" for f in found)}),
            flush=True,
        )


class Rows:
    """Scaled rows of a store's hook: some to learn from, some to measure on."""

    def __init__(self, store: ActivationStore, hook: str) -> None:
        fit, held = (
            torch.cat([torch.from_numpy(part.acts) for part in store.rows(hook, split)])
            for split in ("fit", "confirm")
        )
        scale = (fit - fit.mean(0)).square().mean().sqrt()
        self.rng = torch.Generator().manual_seed(1)
        self.fit, self.held = (fit - fit.mean(0)) / scale, (held - fit.mean(0)) / scale
        self.held = self.held[torch.randperm(len(held), generator=self.rng)[:20_000]]

    def next(self, rows: int) -> torch.Tensor:
        """Draw rows to learn from."""
        return self.fit[torch.randint(len(self.fit), (rows,), generator=self.rng)]


class Sweep(NamedTuple):
    """What is tried: rows to learn from, and numbers of which each is twice the one before."""

    rows: int = ROWS
    ks: Sequence[int] = (2, 4, 8, 16, 32)
    widths: Sequence[int] = (64, 128, 256, 512)


def measured(data: Rows, d_sae: int, k: int, rows: int = ROWS) -> tuple[float, float]:
    """Return the FVU of a dictionary on held-out rows, and the share of its features that are silent there."""
    config = SAEConfig.model_validate({"kind": "batch_topk", "d_sae": d_sae, "k": k})
    dictionary = train(config, TrainConfig(rows=rows), data.next, d_in=data.held.shape[1])[0]
    with torch.inference_mode():
        codes = dictionary.encode(data.held)
        x_hat = dictionary.decode(codes)
    fvu = float((data.held - x_hat).square().sum() / (data.held - data.held.mean(0)).square().sum())
    return fvu, 1 - len(codes.features.unique()) / d_sae


def best(data: Rows, sweep: Sweep) -> tuple[int, int]:
    """Return k and d_sae by the criterion above."""

    def show(d_sae: int, k: int) -> tuple[float, float]:
        fvu, silent = measured(data, d_sae, k, sweep.rows)
        print(f"    d_sae {d_sae:>5} k {k:>3}: FVU {fvu:.4f}, silent {silent:.1%}", flush=True)
        return fvu, silent

    at_k = {k: show(WIDE, k)[0] for k in sweep.ks}
    k = next((k for k in sweep.ks[:-1] if at_k[k] - at_k[2 * k] < WORTH_K), sweep.ks[-1])
    widths = [d_sae for d_sae in sweep.widths if d_sae > k]
    at = {d_sae: show(d_sae, k) for d_sae in (*widths, 2 * widths[-1])}
    enough = (
        d_sae
        for d_sae in widths
        if at[d_sae][0] - at[2 * d_sae][0] < WORTH_WIDTH * at[d_sae][0] or at[2 * d_sae][1] > MOST_SILENT
    )
    return k, next(enough, 2 * widths[-1])


def stores(paths: list[Path], hooks: Sequence[str], sweep: Sweep) -> None:
    """Compare with what a sweep over activations finds."""
    for path in paths:
        store = ActivationStore.open(path)
        for hook in hooks or store.hooks:
            data, where = Rows(store, hook), {"store": str(path), "hook": hook}
            print(json.dumps({**where, "suggested": suggested(data.next(SAMPLE_ROWS))}), flush=True)
            k, d_sae = best(data, sweep)
            print(json.dumps({**where, "best": {"k": k, "d_sae": d_sae}}), flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True, dest="command")
    known = commands.add_parser("planted")
    known.add_argument("--train", action="store_true")
    commands.add_parser("clouds")
    swept = commands.add_parser("stores")
    swept.add_argument("paths", nargs="+", type=Path, metavar="STORE")
    swept.add_argument("--hooks", nargs="+", default=[], metavar="HOOK", help="default: all of each store")
    for name, default in Sweep()._asdict().items():
        many = {} if name == "rows" else {"nargs": "+"}
        swept.add_argument(f"--{name}", type=int, default=default, metavar="N", **many)
    given = parser.parse_args()
    if given.command == "planted":
        planted(trained=given.train)
    elif given.command == "clouds":
        clouds()
    else:
        stores(given.paths, given.hooks, Sweep(given.rows, given.ks, given.widths))


if __name__ == "__main__":
    main()
