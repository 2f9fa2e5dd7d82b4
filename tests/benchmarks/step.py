"""The time of one training step of every kind, relative to the dense encoder product that it cannot avoid.

    python tests/benchmarks/step.py [--rounds N] [--peers] [SIZE ...]     SIZE = d_in/d_sae/k/batch

A step is everything the loop does for a batch: losses, gradients, projection, Adam, unit rows, dead counters.
Contenders are interleaved, so that a disturbance hits all alike; the ratio is that of the best and of the
median. A run during which other processes used more than 0.2 of a core is invalid and says so. With --peers
the step of every other SAE library that is installed is timed too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import SAEConfig
from sae.config import parse_config
from sae.world import World
from train.optim import make_adam
from train.plan import TrainConfig, make_plan
from train.state import TrainState
from train.step import train_step

SIZES = ("128/2048/16/4096", "512/16384/32/2048", "768/24576/64/2048")
WORLD = World()
BATCHES = 4
DEAD_SHARE = 0.1

Step = Callable[[int], object]


def encoder_product(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """The floor: x W_encᵀ + b_enc, once."""
    W, b = torch.randn(d_sae, x[0].shape[1]), torch.zeros(d_sae)
    return lambda i: torch.addmm(b, x[i % BATCHES], W.T)


def own(kind: str, dead: float) -> Callable[[list[torch.Tensor], int, int], Step]:
    """One of our kinds, with a share of its features held dead so that AuxK works."""

    def make(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
        config = parse_config(SAEConfig, {"kind": kind, "d_sae": d_sae, "k": k}, where="benchmark")
        sae = config.build(x[0].shape[1], generator=torch.Generator().manual_seed(0))
        plan = make_plan(
            TrainConfig(rows=10**9, batch_size=len(x[0]), lr=1e-4, dead_after_rows=2**62), config
        )
        optimiser, state = make_adam(sae), TrainState.start(d_sae, WORLD.device)
        asleep = torch.arange(d_sae) < dead * d_sae

        def step(i: int) -> object:
            state.silent_rows = torch.where(asleep, 2**62, 0)
            return train_step(sae, optimiser, state, x[i % BATCHES], plan=plan, world=WORLD)

        return step

    return make


def sparsify(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """EleutherAI's sparsify, with the decoder it falls back to where Triton has no device."""
    import sparsify.sparse_coder as module
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.utils import eager_decode

    module.decoder_impl = eager_decode
    config = SparseCoderConfig(num_latents=d_sae, k=k)
    peer = SparseCoder(x[0].shape[1], config, device="cpu", dtype=torch.float32)
    optimiser = torch.optim.Adam(peer.parameters(), lr=1e-4, fused=True)

    def step(i: int) -> None:
        out = peer(x[i % BATCHES])
        optimiser.zero_grad()
        out.fvu.backward()
        peer.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        peer.set_decoder_norm_to_unit_norm()

    return step


def sae_lens(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """sae-lens, TopK."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    peer = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x[0].shape[1], d_sae=d_sae, k=k, device="cpu"))
    optimiser = torch.optim.Adam(peer.parameters(), lr=1e-4)

    def step(i: int) -> None:
        given = TrainStepInput(
            sae_in=x[i % BATCHES],
            coefficients=peer.get_coefficients(),
            dead_neuron_mask=None,
            n_training_steps=i,
            is_logging_step=False,
        )
        loss = peer.training_forward_pass(given).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def dictionary_learning(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """dictionary_learning, TopK."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    peer = TopKTrainer(
        steps=100_000,
        activation_dim=x[0].shape[1],
        dict_size=d_sae,
        k=k,
        layer=0,
        lm_name="",
        device="cpu",
        lr=1e-4,
    )
    return lambda i: peer.update(i + 1, x[i % BATCHES])


def others_busy(own_seconds: float, wall: float, before: float) -> float:
    """Return the cores that other processes kept busy."""
    return max(0.0, (machine_seconds() - before - own_seconds) / wall)


def machine_seconds() -> float:
    """Return the processor seconds of all processes since the machine started; 0 where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = (int(n) for n in stat.read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(size: str, rounds: int, peers: bool) -> dict[str, object]:
    """Time every contender at one size."""
    d_in, d_sae, k, batch = (int(part) for part in size.split("/"))
    torch.manual_seed(0)
    x = [torch.randn(batch, d_in) @ torch.randn(d_in, d_in) / d_in**0.5 for _ in range(BATCHES)]
    makers = {"encoder product": encoder_product}
    for kind in sorted(SAEConfig.kinds):
        makers |= {kind: own(kind, 0.0), f"{kind}, {DEAD_SHARE:.0%} dead": own(kind, DEAD_SHARE)}
    if peers:
        makers |= {"sparsify": sparsify, "sae-lens": sae_lens, "dictionary_learning": dictionary_learning}
    steps, missing = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make(x, d_sae, k)
            steps[name](0)
        except ImportError as error:
            missing[name] = str(error)
            steps.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    machine, mine, wall = machine_seconds(), time.process_time(), time.perf_counter()
    for i in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step(i + 1)
            times[name].append(time.perf_counter() - started)
    busy = others_busy(time.process_time() - mine, time.perf_counter() - wall, machine)
    best, median = min(times["encoder product"]), statistics.median(times["encoder product"])
    return {
        "size": size,
        "valid": busy <= 0.2,
        "cores_used_by_others": round(busy, 2),
        "milliseconds": {name: round(1e3 * min(ts), 1) for name, ts in times.items()},
        "ratio_of_best": {name: round(min(ts) / best, 2) for name, ts in times.items()},
        "ratio_of_median": {name: round(statistics.median(ts) / median, 2) for name, ts in times.items()},
        "not_installed": sorted(missing),
    }


def main() -> None:
    """Print one JSON object per size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", default=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.processor()}
    print(json.dumps(machine))
    for size in options.sizes:
        print(json.dumps(measure(size, options.rounds, options.peers), indent=1), flush=True)


if __name__ == "__main__":
    main()
