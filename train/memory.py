"""Bytes that a training holds, by part: what the planner adds up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae.kernels.sparse import CHUNK_ENTRIES, ROWS_PER_CHUNK

from .machines import Machine
from .trainer import SAMPLE_ROWS

if TYPE_CHECKING:
    from .planner import Job, Mesh

BATCHES_LOADED = 8
"""Batches that the loader keeps memory for: ready, being filled, in use."""

BATCHES_RECORDED = 10
"""Tensors of a batch's shape while a record is made: rows and reconstruction, and in float64, which is twice as much, both,
their difference and its square."""

BATCHES_LEARNED, BATCHES_NESTED = 6, 2
"""The same on the way back, and for each reconstruction: scaled, centred, x̂, gradients; the residual and its gradient."""

LIBRARIES, BF16_LIBRARIES, SIZES_LIBRARIES = 121 << 20, 7 << 20, 12 << 20
"""Of what the first step imports (mostly numba, which compiles what selects) and of the libraries' pages and buffers that
training touches, beyond what importing the trainer takes; what products in bf16 add; and what the estimate of sizes does,
which is in float64 and has eigenvalues. Measured on a CPU, by trainings of 64 and 512 features that hold little else."""

TENSORS_SIZED = 7
"""The first rows, as so many of them, while sizes are estimated: the sample, and three of that in float64."""

CODE_BYTES = 48
"""Of a code at the peak: value, feature, row, its place by feature, and their gradients."""

LOOK_BYTES, SORTED_BYTES = 12, 20
"""Of a code that a look keeps for the way back, value and feature; and what sorting codes keeps of one, order included."""

_FLOAT, _HALF = 4, 2


def device_bytes(job: Job, mesh: Mesh, machine: Machine, dead: int) -> dict[str, float]:
    """Return the bytes that a rank's device holds while it trains, by part, with so many of its features dead."""
    rows, features = job.plan.batch_size / mesh.data, job.d_sae // mesh.feature
    trained, work = _FLOAT * (job.trained / mesh.feature + job.trained_shared), job.work
    product = _product_bytes(job, mesh, machine)
    if in_bf16(job, machine):
        product += _HALF * (features + rows) * job.d_in
    if machine.device == "cuda":
        # Triton keeps 8 candidates of 16 bytes for each tile of 128 features, of all rows at once
        product += rows * features
    else:
        # the selection's copy or mask of the chunk
        product += _chunk(job, mesh) * features
    batch = _FLOAT * rows * job.d_in
    codes = rows * min(work.active, features) / (1 if work.per_row else mesh.feature)
    sorted_ = SORTED_BYTES * (work.by_rank or work.by_rate)
    learned = BATCHES_LEARNED + BATCHES_NESTED * work.reconstructions + work.looks
    auxiliary = min(job.k_aux, dead) * rows
    return {
        "parameters": _FLOAT * (job.sharded / mesh.feature + job.shared) + 8 * features,
        # a matrix that is used again gets a second gradient, and their sum beside them
        "gradients": trained + 2 * _FLOAT * features * job.d_in * (work.looks > 0),
        "Adam's moments": 2 * trained,
        "batch": max(BATCHES_RECORDED, learned) * batch,
        "pre-activations": product,
        "codes": (CODE_BYTES + sorted_ + LOOK_BYTES * work.looks) * codes,
        "AuxK": CODE_BYTES * auxiliary + 4 * _FLOAT * dead * job.d_in + 3 * batch * (dead > 0),
    }


def host_bytes(job: Job, mesh: Mesh, machine: Machine, device: dict[str, float]) -> dict[str, float]:
    """Return the bytes that a rank holds besides, by part: of its host's memory, which without a GPU is the device's too."""
    held = job.split_rows or 0 if job.in_memory else 2 * job.window_rows / mesh.data
    batch = job.row_bytes * job.plan.batch_size / mesh.data
    # windows consist of batches unless all rows fit; torch pins memory in powers of two
    pinned = 2 ** math.ceil(math.log2(batch)) / batch if machine.device == "cuda" else 1.0
    host = {
        "loader windows": held * job.row_bytes * (1.0 if job.in_memory else pinned),
        "batches ahead": BATCHES_LOADED * batch * pinned,
        "checkpoint copy": _FLOAT * (job.sharded + 2 * job.trained) / mesh.feature,
    }
    return host if machine.device == "cuda" else host | _heap_bytes(job, machine, device, host)


def in_bf16(job: Job, machine: Machine) -> bool:
    """Return whether the encoder's product is in bf16."""
    return machine.bf16 if job.precision == "auto" else job.precision == "bf16"


def _chunk(job: Job, mesh: Mesh) -> int:
    """Return the rows whose pre-activations a rank holds at once."""
    features = job.d_sae // mesh.feature
    return max(1, min(ROWS_PER_CHUNK, CHUNK_ENTRIES // features, job.plan.batch_size // mesh.data))


def _product_bytes(job: Job, mesh: Mesh, machine: Machine) -> float:
    """Return the bytes of these pre-activations."""
    halved = machine.device != "cuda" and in_bf16(job, machine)
    return (_HALF if halved else _FLOAT) * _chunk(job, mesh) * job.d_sae / mesh.feature


def _heap_bytes(
    job: Job, machine: Machine, device: dict[str, float], host: dict[str, float]
) -> dict[str, float]:
    """Return what a process without a GPU takes besides: all of its memory is one heap, which keeps what a step frees.

    Torch asks for aligned blocks, for which glibc (before 2.38) wants more room than such a block leaves when it is
    freed. So none is taken for another of its size until its neighbours are free too, and what a step holds at its
    peak comes to lie in the heap twice. That peak is at the selection, before there are gradients, or with these.
    """
    selecting = sum(device[name] for name in ("pre-activations", "codes", "AuxK"))
    learning = sum(device[name] for name in ("gradients", "batch"))
    # before the first step; of batches larger than the sample, a copy by batch and one of all
    first = _FLOAT * job.d_in * max(TENSORS_SIZED * SAMPLE_ROWS, 2 * job.plan.batch_size)
    later = sum(device.values()) - device["parameters"] + sum(host.values())
    return {
        "libraries": LIBRARIES + SIZES_LIBRARIES + BF16_LIBRARIES * in_bf16(job, machine),
        "first rows, beyond what is taken later": max(0.0, first - later),
        "gaps in the heap": 2 * max(selecting, learning) - selecting - learning,
    }
