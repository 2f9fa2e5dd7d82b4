"""How well dictionaries find planted directions: `python -m tests.benchmarks.recovery [--kinds topk] [--rates zipf]`.

128 dimensions, 768 unit directions, L0 10, sizes 1 to 2, noise 0.05, two million rows. Directions fire independently,
all equally often (`uniform`) or with rates that fall as 1 / rank^0.8 (`zipf`: the rarest on about one row in 500, the
commonest on two of five). Settings may be given as `--set key=value`, of the dictionary or of its training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAE, Batch, SAEConfig
from sae.metrics import match
from sae.world import World
from train.optim import make_adam
from train.plan import Plan, TrainConfig, make_plan
from train.state import TrainState
from train.step import train_step

D_IN, D_SAE, L0 = 128, 768, 10.0
ROWS = 2_000_000


class Planted:
    """Rows of known make, drawn as they are asked for."""

    def __init__(self, rates: str, seed: int, *, n_directions: int = D_SAE, l0: float = L0) -> None:
        rng = torch.Generator().manual_seed(1000 + seed)
        directions = torch.randn(n_directions, D_IN, generator=rng)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        p = np.ones(n_directions) if rates == "uniform" else np.arange(1, n_directions + 1) ** -0.8
        self.p = torch.from_numpy(np.minimum(p / p.sum() * l0, 0.5)).float()
        self.rng = rng
        sample = self.raw(20_000)
        self.mean = sample.mean(0)
        self.scale = float((sample - self.mean).square().mean().sqrt())

    def raw(self, rows: int) -> torch.Tensor:
        """Draw rows in their own units."""
        return self.raw_with_fires(rows)[0]

    def raw_with_fires(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw rows in their own units, and which directions fire on each."""
        fires = torch.rand(rows, len(self.p), generator=self.rng) < self.p
        feature = fires.nonzero()[:, 1]
        size = 1 + torch.rand(len(feature), generator=self.rng)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), fires.sum(1).cumsum(0)])
        x = torch.nn.functional.embedding_bag(
            feature, self.directions, offsets, mode="sum", per_sample_weights=size, include_last_offset=True
        )
        return x + 0.05 * torch.randn(rows, D_IN, generator=self.rng), fires

    def next(self, rows: int) -> torch.Tensor:
        """Draw scaled rows, as training sees them."""
        return (self.raw(rows) - self.mean) / self.scale


def train(
    config: SAEConfig,
    asked: TrainConfig,
    draw: Callable[[int], torch.Tensor],
    *,
    d_in: int = D_IN,
    seed: int = 0,
) -> tuple[SAE, TrainState, Plan]:
    """Train a dictionary on scaled rows as they are drawn."""
    plan, world = make_plan(asked, config), World.single("cpu")
    sae = config.build(d_in, generator=torch.Generator().manual_seed(seed))
    optimiser, state = make_adam(sae), TrainState.start(config.d_sae, world.device)
    while state.step < plan.steps:
        train_step(sae, optimiser, state, Batch(draw(plan.batch_size)), plan=plan, world=world)
    sae.settle((draw(plan.batch_size) for _ in range(plan.settle_batches)), world=world)
    return sae, state, plan


def run(kind: str, rates: str, seed: int, settings: dict[str, object]) -> dict[str, object]:
    """Train one dictionary and compare its directions with the planted ones."""
    of_sae = {k: v for k, v in settings.items() if k not in TrainConfig.model_fields}
    config = SAEConfig.model_validate({"kind": kind, "d_sae": D_SAE, "k": round(L0), **of_sae})
    asked = TrainConfig.model_validate(
        {"rows": ROWS} | {k: v for k, v in settings.items() if k not in of_sae}
    )
    data = Planted(rates, seed)
    began = time.perf_counter()
    sae, state, plan = train(config, asked, data.next, seed=seed)
    x = data.next(20_000)
    with torch.inference_mode():
        codes = sae.encode(x)
        x_hat = sae.decode(codes)
    best = (sae.W_dec.detach() @ data.directions.T).max(0).values
    rare = data.p <= data.p.quantile(0.25)
    return {
        "kind": kind,
        "rates": rates,
        "seed": seed,
        **settings,
        "mcc": round(match(sae.W_dec.detach(), data.directions).mcc, 4),
        "found": round(float((best > 0.9).float().mean()), 3),
        "found_rarest_quarter": round(float((best[rare] > 0.9).float().mean()), 3),
        "fvu": round(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), 4),
        "l0": round(len(codes.values) / len(x), 2),
        "dead": round(float(state.dead(plan.dead_after_rows).double().mean()), 3),
        "batch_size": plan.batch_size,
        "lr": plan.lr,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Run what the command line asks for; one JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", nargs="+", default=["topk", "batch_topk"])
    parser.add_argument("--rates", nargs="+", default=["uniform", "zipf"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    settings = {key: json.loads(value) for key, value in (item.split("=", 1) for item in given.set)}
    for kind in given.kinds:
        for rates in given.rates:
            for seed in given.seeds:
                print(json.dumps(run(kind, rates, seed, settings)), flush=True)


if __name__ == "__main__":
    main()
