"""A whole training from a cold store against bare steps on rows in memory.

    python -m tests.benchmarks.train [--kind topk] [--size d_in/d_sae/k/batch] [--steps N] [--rounds N] [--folder DIR]

The bare steps learn from batches of the same rows, from the same start, and hold no more than the training does; both
take turns, and a ratio is formed within each turn. The whole is everything between opening the store and the saved
dictionary: the sample, the estimate, reading with checksums, scaling, steps, metrics, checkpoints. The kernel is told
to forget the store before each. A run during which other processes used more than 0.2 of a core is invalid.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.config import parse_config
from sae.kernels import find_precision
from sae.world import World
from tests.benchmarks.step import machine_seconds
from tests.benchmarks.store import forget
from tests.train.runs import plant
from tests.train.test_train_sae import HOOK, write
from train.allocation import kept_memory
from train.optim import make_adam
from train.plan import TrainConfig, make_plan
from train.run import train_sae
from train.state import TrainState
from train.step import train_step
from train.trainer import METRICS


def bare(x: torch.Tensor, sae_config: SAEConfig, config: TrainConfig) -> float:
    """Return rows per second of the steps alone."""
    plan, world = make_plan(config, sae_config), World()
    sae = sae_config.build(x.shape[1], generator=torch.Generator().manual_seed(0))
    sae.precision = find_precision(config.precision, world.device)
    optimiser, state = make_adam(sae), TrainState.start(sae.d_sae, world.device)
    batches = x.split(plan.batch_size)
    began = time.perf_counter()
    with kept_memory(parameters=0):
        for step in range(plan.steps):
            train_step(sae, optimiser, state, Batch(batches[step % len(batches)]), plan=plan, world=world)
    return plan.rows / (time.perf_counter() - began)


def whole(store: Path, sae_config: SAEConfig, config: TrainConfig) -> tuple[float, float, float]:
    """Return rows per second of the whole and of its loop alone, and the share of the loop's time spent waiting."""
    forget(store)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        began = time.perf_counter()
        train_sae(store, sae_config, config, work / "out", hook=HOOK, work=work / "w", seed=0, world=World())
        seconds = time.perf_counter() - began
        records = [json.loads(line) for line in (work / "out" / METRICS).read_text().splitlines()]
    spans = [b["seconds"] - a for a, b in zip([0.0, *(r["seconds"] for r in records)], records, strict=False)]
    waited = sum(r["wait_share"] * span for r, span in zip(records, spans, strict=True))
    rows, loop = records[-1]["rows"], records[-1]["seconds"]
    return rows / seconds, rows / loop, waited / loop


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="topk")
    parser.add_argument("--size", default="128/2048/16/4096")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the store is written")
    args = parser.parse_args()
    torch.set_deterministic_debug_mode("error")
    d_in, d_sae, k, batch = map(int, args.size.split("/"))
    sae_config = parse_config(SAEConfig, {"kind": args.kind, "d_sae": d_sae, "k": k}, where="benchmark")
    config = TrainConfig(rows=args.steps * batch, batch_size=batch)
    rows = plant(args.steps * batch, d_in=d_in, features=6 * d_in).x
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{args.kind} {args.size}, {args.steps} steps")
    x = (rows - rows.mean(0)) / (rows - rows.mean(0)).square().mean().sqrt()
    found = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        store = write(Path(name) / "activations.zarr", rows.numpy())
        del rows
        machine, mine, wall = machine_seconds(), time.process_time(), time.perf_counter()
        for turn in range(args.rounds + 1):
            alone, (all_of_it, loop, waited) = bare(x, sae_config, config), whole(store, sae_config, config)
            if turn:
                found.append((alone, all_of_it / alone, loop / alone, waited))
        others = machine_seconds() - machine - (time.process_time() - mine)
        busy = max(0.0, others / (time.perf_counter() - wall))
    names = ("bare steps, rows/s", "whole training / bare steps", "its loop / bare steps", "waiting for data")
    for name, values in zip(names, zip(*found, strict=True), strict=True):
        print(
            f"{name:<30} median {statistics.median(values):,.3f}, from {min(values):,.3f} to {max(values):,.3f}"
        )
    print(f"{'valid' if busy <= 0.2 else 'INVALID'}: other processes used {busy:.2f} cores")


if __name__ == "__main__":
    main()
