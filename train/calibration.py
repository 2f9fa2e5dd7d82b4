"""What a step reaches of the rates that a machine has for large products and copies, by a few real steps."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch

import sae.architectures  # noqa: F401 - registers the kinds
from sae.base import Batch, SAEConfig
from sae.config import parse_config
from sae.kernels import find_precision
from sae.world import World

from .allocation import kept_memory
from .machines import Machine, share_of_threads
from .optim import make_adam
from .plan import TrainConfig
from .planner import Job, Mesh, describe, estimate
from .state import TrainState
from .step import train_step

_LARGEST = {"cpu": 2**30, "cuda": 2**36}
"""Multiplications of the encoder's product in the steps that are timed."""

_MOST_ROWS = {"cpu": 2048, "cuda": 8192}
_MOST_WEIGHTS = {"cpu": 2**23, "cuda": 2**26}
"""Of each matrix; eight of them are held."""
_FEATURES_PER_CODE = 32
"""At least, where the job has as many: with fewer the kernels go other ways."""
_STEPS = 5


def calibrate(machine: Machine, job: Job, device: torch.device, *, ranks: int) -> Machine:
    """Return a machine whose rates are those that steps of a dictionary like the planned one reach; takes some seconds.

    Selection and sparse sums run below the rates of large products and copies, and the more so the smaller a step
    is, so a step is timed that is as wide and as sparse as the job's, with as many rows and features as a short
    measurement allows.

    Parameters
    ----------
    machine
        As `train.machines.probe` found it for so many ranks.
    job
        What is planned.
    device
        Where to measure.
    ranks
        Ranks of the plan; the timed step has at most a rank's share of the rows.
    """
    largest = _LARGEST[device.type] // job.d_in
    most = max(job.work.active, min(job.d_sae, _MOST_WEIGHTS[device.type] // job.d_in))
    sparse = min(most, _FEATURES_PER_CODE * job.work.active)
    rows = max(1, min(job.plan.batch_size // ranks, _MOST_ROWS[device.type], largest // sparse))
    features = max(sparse, min(most, largest // rows))
    kind = "topk" if job.work.per_row else "batch_topk"
    settings = {"kind": kind, "d_sae": features, "k": job.work.active}
    config = parse_config(SAEConfig, settings, where="calibration")
    given = {"rows": 1000 * rows, "batch_size": rows, "precision": job.precision}
    train = parse_config(TrainConfig, given, where="calibration")
    like = describe(config, train, d_in=job.d_in, split_rows=rows)
    reckoned = estimate(like, Mesh(1, 1), machine, dead_share=0.0).step_seconds
    # one process measures, with all its threads
    reached = reckoned * share_of_threads(device, ranks) / _step_seconds(config, like, device)
    text = f"measured, x {reached:.2f} that a step of {features:,} features reaches"
    return replace(
        machine,
        matmul=machine.matmul * reached,
        bandwidth=machine.bandwidth * reached,
        sources={**machine.sources, "matmul": text, "bandwidth": text},
    )


def _step_seconds(config: SAEConfig, job: Job, device: torch.device) -> float:
    """Return the median seconds of a training step on rows of noise."""
    generator = torch.Generator().manual_seed(0)
    sae = config.build(job.d_in, generator=generator).to(device)
    sae.precision = find_precision(job.precision, device)
    x = torch.randn(job.plan.batch_size, job.d_in, generator=generator).to(device)
    optimiser, state, world = make_adam(sae), TrainState.start(sae.d_sae, device), World(device=device)
    seconds = []
    with kept_memory(sum(p.nbytes for p in sae.parameters() if p.device.type == "cpu")):
        for _ in range(2 + _STEPS):
            started = time.perf_counter()
            train_step(sae, optimiser, state, Batch(x), plan=job.plan, world=world)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])
