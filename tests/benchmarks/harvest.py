"""How much a harvest slows the model down: rows per second, writing included, against its bare forward passes.

    python -m tests.benchmarks.harvest [--model credit|gpt2] [--rows N] [--repeats 5] [--folder DIR]

Per turn the same batches go through the model alone, through the model with hooks (the source without a writer),
and through a whole harvest with fsync and commits; contenders take turns, ratios are formed within each turn. The
CPU seconds beside them say what the writing costs where it does not hide behind the model.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from activations_cache.harvest import HarvestConfig, harvest
from activations_cache.inputs import ModelInputs
from activations_cache.reference.credit_transformer import CreditTransformer, CreditTransformerConfig
from activations_cache.schema import StoreLayout
from activations_cache.sources.reading import ModelSource
from sae.world import World

from .store import Turns, busy_seconds, measure, own_seconds, show

ROWS = {"credit": 1 << 18, "gpt2": 1 << 13}


class Sequences:
    """Calls that are made beforehand, so that nothing but the model and the harvest takes time."""

    def __init__(self, calls: list[ModelInputs]) -> None:
        self.calls = calls
        self.n_rows = sum(call.real.size for call in calls)
        n = int(calls[-1].entity.max()) + 1
        self.entities = pa.table({"entity": np.arange(n), "id": [str(i) for i in range(n)]})

    def plan(self, world: World) -> Iterator[int]:
        yield from range(world.rank, len(self.calls), world.size)

    def load(self, step: int) -> ModelInputs:
        return self.calls[step]

    def split(self, entity: np.ndarray, time: np.ndarray) -> np.ndarray:
        return np.minimum(entity % 5, 2)


def credit_calls(rows: int) -> tuple[nn.Module, str, list[ModelInputs]]:
    """CreditTransformer, d 128, 4 layers, 8 columns; histories of 64 months, 8192 rows a call."""
    columns, rng = 8, np.random.default_rng(0)
    knots = np.sort(rng.standard_normal((columns, 16)), axis=1).tolist()
    config = CreditTransformerConfig(
        columns=[f"c{i}" for i in range(columns)], knots=knots, centre=[0.0] * columns, spread=[1.0] * columns
    )
    calls = []
    for entity, position in places(rows, batch=128, length=64):
        values = torch.from_numpy(rng.standard_normal((*entity.shape, columns), np.float32))
        gap = torch.zeros(entity.shape, dtype=torch.long)
        calls.append(inputs_of((values, gap), {}, entity, position))
    return CreditTransformer(config), "layers.2", calls


def gpt2_calls(rows: int) -> tuple[nn.Module, str, list[ModelInputs]]:
    """GPT-2's body, d 768, 12 layers; 1024 tokens a call."""
    from transformers import GPT2Config, GPT2Model

    rng, calls = np.random.default_rng(0), []
    for entity, position in places(rows, batch=8, length=128):
        tokens = torch.from_numpy(rng.integers(0, 50257, entity.shape))
        calls.append(inputs_of((tokens,), {"use_cache": False}, entity, position))
    return GPT2Model(GPT2Config()), "h.8", calls


def places(rows: int, *, batch: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, rows // length, batch):
        entity = np.repeat(np.arange(start, start + batch), length).reshape(batch, length)
        yield entity, np.tile(np.arange(length), (batch, 1))


def inputs_of(args: tuple, kwargs: dict, entity: np.ndarray, position: np.ndarray) -> ModelInputs:
    return ModelInputs(args, kwargs, entity, position, position, np.ones(entity.shape, bool))


def bare(model: nn.Module, calls: list[ModelInputs]) -> None:
    with torch.inference_mode():
        for call in calls:
            model(*call.args, **call.kwargs)


def hooked(source: ModelSource) -> None:
    for _ in source.batches(World()):
        pass


def harvested(source: ModelSource, path: Path, layout: StoreLayout) -> None:
    harvest(source, path, HarvestConfig(layout=layout), seed=0, world=World())


def measure_turns(folder: Path, args: argparse.Namespace) -> tuple[Turns, int]:
    build = {"credit": credit_calls, "gpt2": gpt2_calls}[args.model]
    model, hook, calls = build(args.rows or ROWS[args.model])
    source = ModelSource(Sequences(calls), model, [hook], provenance={})
    layout = StoreLayout(dtype=args.dtype)
    turns: Turns = {"raw": [], "hooks": [], "harvest": []}
    for turn in range(args.repeats + 1):
        path = folder / f"{turn}.zarr"
        work = {
            "raw": partial(bare, source.model, calls),
            "hooks": partial(hooked, source),
            "harvest": partial(harvested, source, path, layout),
        }
        for name, one in work.items():
            os.sync()
            took = measure(one)
            if turn:
                turns[name].append(took)
        shutil.rmtree(path)
    (width,) = source.hooks.values()
    return turns, source.n_rows * width * (4 if args.dtype == "float32" else 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["credit", "gpt2"], default="credit")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    began, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        turns, n_bytes = measure_turns(Path(name), args)
    show(f"{args.model}, {n_bytes / 1e6:.0f} MB {args.dtype}", turns, n_bytes)
    wall = time.perf_counter() - began
    others = (busy_seconds() - busy - own_seconds() + own) / wall
    print(f"other processes used {others:.2f} cores: {'INVALID' if others > 0.2 else 'valid'}")


if __name__ == "__main__":
    main()
