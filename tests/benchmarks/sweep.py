"""A sweep of same-shape members against as many lone runs: time, and bytes read from the store.

    python -m tests.benchmarks.sweep [--kind KIND] [--size d_in/d_sae/k/batch] [--members N | --ks K,...] [--steps N]
        [--rounds N]

Members differ in their seed, or in k where --ks lists one for each. A sweep as it comes, one whose members are not
stacked and lone runs are interleaved; ratios are of the best and of the median. Bytes are those of the rows that the
loader reads, decompressed. A run during which other processes used more than 0.2 of a core is invalid.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from activations_cache.selection import Selection
from sae.base import SAEConfig
from sae.config import parse_config
from sae.world import World
from tests.benchmarks.step import machine_seconds
from tests.train.runs import plant
from tests.train.test_train_sae import HOOK, write
from train import groups
from train.plan import TrainConfig
from train.run import Run, train_saes
from train.sweep import Member, make_members


class Cost(NamedTuple):
    seconds: float
    read: int


def train(store: Path, groups: Sequence[tuple[Member, ...]], reads: list[int]) -> Cost:
    """Train groups of members, each from one read, one group after another."""
    reads.clear()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for group in groups:
            runs = [
                Run(m.sae, m.train, m.seed, Path(name) / m.name, Path(name, "work", m.name)) for m in group
            ]
            train_saes(store, runs, hook=HOOK, row_seed=0, world=World())
    return Cost(time.perf_counter() - began, sum(reads))


def count_reads() -> list[int]:
    """Return a list that gets the bytes of every piece that any loader reads from now on."""
    sizes: list[int] = []
    read = Selection.read

    def counted(
        self: Selection, piece: tuple[int, int, int], buffers: Mapping[str, np.ndarray], at: int
    ) -> None:
        sizes.append(sum(buffers[name][at : at + piece[2]].nbytes for name in self.names))
        read(self, piece, buffers, at)

    Selection.read = counted  # type: ignore[method-assign]
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="topk")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--ks", default="")
    parser.add_argument("--size", default="128/2048/16/4096")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_deterministic_debug_mode("error")
    reads = count_reads()
    d_in, d_sae, k, batch = map(int, args.size.split("/"))
    base = parse_config(SAEConfig, {"kind": args.kind, "d_sae": d_sae, "k": k}, where="benchmark")
    config = TrainConfig(rows=args.steps * batch, batch_size=batch, checkpoint_every=10**6)
    ks = [int(number) for number in args.ks.split(",") if number]
    swept = {"sae.k": ks} if ks else {"seed": list(range(args.members))}
    members = make_members(base.model_copy(update={"k": ks[0]}) if ks else base, config, 0, swept)
    costs: dict[str, list[Cost]] = {"sweep": [], "not stacked": [], "alone": []}
    with tempfile.TemporaryDirectory() as name:
        rows = plant(args.steps * batch, d_in=d_in, features=6 * d_in)
        store = write(Path(name) / "activations.zarr", rows.x.numpy())
        machine, mine, wall = machine_seconds(), time.process_time(), time.perf_counter()
        for _ in range(args.rounds):
            costs["sweep"].append(train(store, [members], reads))
            with mock.patch.object(groups, "SMALL_PRODUCT", 0):
                costs["not stacked"].append(train(store, [members], reads))
            costs["alone"].append(train(store, [(member,) for member in members], reads))
        others = machine_seconds() - machine - (time.process_time() - mine)
        busy = max(0.0, others / (time.perf_counter() - wall))
    for kind, found in costs.items():
        seconds = [cost.seconds for cost in found]
        best, median = min(seconds), statistics.median(seconds)
        print(f"{kind}: best {best:.1f} s, median {median:.1f} s, {found[0].read / 1e6:,.1f} MB read")
    for other in ("not stacked", "alone"):
        for name, of in (("best", min), ("median", statistics.median)):
            ratio = of(c.seconds for c in costs[other]) / of(c.seconds for c in costs["sweep"])
            print(f"{other}: {ratio:.2f} times as long ({name})")
    print(f"{'valid' if busy <= 0.2 else 'INVALID'}: other processes used {busy:.2f} cores")


if __name__ == "__main__":
    main()
