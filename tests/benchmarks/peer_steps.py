"""Training steps of other SAE libraries, timed in their own environment: a worker that `step.py` starts and asks.

    peers/bin/python tests/benchmarks/peer_steps.py        reads and answers one line of JSON at a time

The floor is timed in a process of its own too, for what it costs depends on how a process keeps its memory. It
imports nothing of this project, so that an environment which holds only the peers can run it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch

BATCHES = 4
Step = Callable[[int], object]


def rows(batch: int, d_in: int, device: str) -> list[torch.Tensor]:
    """The rows that all contenders see: correlated, of mean square about 1."""
    torch.manual_seed(0)
    mixed = [torch.randn(batch, d_in) @ torch.randn(d_in, d_in) / d_in**0.5 for _ in range(BATCHES)]
    return [x.to(device) for x in mixed]


def encoder_product(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """The floor: x W_encᵀ + b_enc, once, in fp32."""
    W, b = torch.randn(d_sae, x[0].shape[1], device=x[0].device), x[0].new_zeros(d_sae)
    return lambda i: torch.addmm(b, x[i % BATCHES], W.T)


def sparsify(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """EleutherAI's sparsify: its Triton decoder on a GPU, the one it falls back to on a CPU."""
    import sparsify.sparse_coder as module
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.utils import eager_decode

    device = x[0].device
    if device.type == "cpu":
        module.decoder_impl = eager_decode
    config = SparseCoderConfig(num_latents=d_sae, k=k)
    peer = SparseCoder(x[0].shape[1], config, device=device, dtype=torch.float32)
    optimiser = torch.optim.Adam(peer.parameters(), lr=1e-4, fused=True)

    def step(i: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = peer(x[i % BATCHES])
        optimiser.zero_grad()
        out.fvu.backward()
        peer.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        peer.set_decoder_norm_to_unit_norm()

    return step


def sae_lens(x: list[torch.Tensor], d_sae: int, k: int) -> Step:
    """sae-lens, TopK; compiled and in bf16 autocast on a GPU."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    device = x[0].device
    config = TopKTrainingSAEConfig(d_in=x[0].shape[1], d_sae=d_sae, k=k, device=str(device))
    peer = TopKTrainingSAE(config)
    optimiser = torch.optim.Adam(peer.parameters(), lr=1e-4)
    forward = peer.training_forward_pass
    if device.type == "cuda":
        forward = torch.compile(forward)

    def step(i: int) -> None:
        given = TrainStepInput(
            sae_in=x[i % BATCHES],
            coefficients=peer.get_coefficients(),
            dead_neuron_mask=None,
            n_training_steps=i,
            is_logging_step=False,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(given).loss
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
        device=str(x[0].device),
        lr=1e-4,
    )
    return lambda i: peer.update(i + 1, x[i % BATCHES])


PEERS = {"sparsify": sparsify, "sae-lens": sae_lens, "dictionary_learning": dictionary_learning}
FLOOR = "encoder product"
STEPS = {FLOOR: encoder_product, **PEERS}
PACKAGES = {"sparsify": "eai-sparsify", "sae-lens": "sae-lens", "dictionary_learning": "dictionary-learning"}


def synchronise(device: str) -> None:
    """Wait for the GPU, if it is one."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Answer {"size": ..., "device": ..., "names": ...} with versions, {"name": ..., "step": ...} with seconds."""
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes elsewhere
    steps: dict[str, Step] = {}
    device = "cpu"
    for line in sys.stdin:
        asked = json.loads(line)
        if "size" in asked:
            d_in, d_sae, k, batch = asked["size"]
            device = asked["device"]
            steps.clear()
            x = rows(batch, d_in, device)
            for name in asked["names"]:
                steps[name] = STEPS[name](x, d_sae, k)
                steps[name](0)
            synchronise(device)
            answer = {"versions": {name: version(PACKAGES[name]) for name in steps if name in PACKAGES}}
        else:
            cpu, started = time.process_time(), time.perf_counter()
            steps[asked["name"]](asked["step"])
            synchronise(device)
            seconds = time.perf_counter() - started
            answer = {"seconds": seconds, "cpu": time.process_time() - cpu}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
