"""What a training would take before it is begun: memory by part, bytes on each link, time, and the mesh to choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sae.base import SAEConfig
from sae.errors import ConfigError
from sae.kernels.sharded import SAMPLE_ROWS
from sae.work import Work

from .machines import USABLE, Machine
from .memory import device_bytes, host_bytes, in_bf16
from .plan import DEAD_SHARE, Plan, TrainConfig, make_plan

WINDOW_BYTES = 512 << 20
"""What the loader draws batches from where `train.loader.window_rows` is 0."""

MOST_RANKS = 2**16
"""How many ranks are tried in search of the smallest mesh that fits."""

_FLOAT, _COUNT = 4, 8
_COUNTS = _COUNT * (2 * 2**11 + 2**9)


@dataclass(frozen=True)
class Job:
    """A training as far as its cost goes.

    Attributes
    ----------
    d_in, d_sae, k_aux
        As in the dictionary.
    work
        What its kind does in a step, with the most active features of any: the first ones, where k falls.
    sharded, shared
        Parameters that are cut by features and those that all ranks hold, numbers.
    trained, trained_shared
        Those of them that get a gradient.
    plan
        Batch size, steps, rows.
    precision
        Of the product, as `TrainConfig` has it.
    row_bytes
        Of one stored row.
    lanes, window_rows
        Of the loader.
    split_rows
        Rows of the store's split; None = more than the loader's window.
    """

    d_in: int
    d_sae: int
    k_aux: int
    work: Work
    sharded: int
    shared: int
    trained: int
    trained_shared: int
    plan: Plan
    precision: str
    row_bytes: int
    lanes: int
    window_rows: int
    split_rows: int | None

    @property
    def in_memory(self) -> bool:
        """Whether the loader holds the whole split."""
        return self.split_rows is not None and self.split_rows <= self.window_rows


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis."""

    data: int
    feature: int

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.data * self.feature


@dataclass(frozen=True)
class Estimate:
    """What one mesh would take; bytes and seconds are those of one rank, of the first where ranks differ.

    Attributes
    ----------
    mesh
        Which.
    device, host
        Bytes held while training, by part; without a GPU both lie in one memory.
    end
        Bytes of host memory on the first rank while the whole dictionary is saved.
    peak_host
        Most of the host's memory at any time; without a GPU all is in it.
    sent
        Bytes a step sends along each axis, and over all ranks.
    read
        Bytes of the store that a rank reads a step.
    seconds
        Of a step, by part; reading runs beside the others.
    fits
        Whether device and host suffice.
    """

    mesh: Mesh
    device: dict[str, float]
    host: dict[str, float]
    end: float
    peak_host: float
    sent: dict[str, float]
    read: float
    seconds: dict[str, float]
    fits: bool

    @property
    def step_seconds(self) -> float:
        """Return the seconds of a step: reading, or all the rest, whichever is longer."""
        rest = sum(value for name, value in self.seconds.items() if name != "reading")
        return max(self.seconds["reading"], rest)


def describe(
    sae: SAEConfig, config: TrainConfig, *, d_in: int, row_bytes: int = 0, split_rows: int | None = None
) -> Job:
    """Return what a training costs by; parameters are counted on a dictionary without memory.

    Parameters
    ----------
    sae, config
        As the run has them.
    d_in
        Width of the activations.
    row_bytes
        Of one stored row; 0 = float32.
    split_rows
        Rows of the split; None where the store is not there yet.
    """
    with FakeTensorMode():
        whole = sae.build(d_in, generator=torch.Generator())
        cut = whole.per_feature()
        parameters = dict(whole.named_parameters())
        trained = {name: value for name, value in parameters.items() if value.requires_grad}
        count = [
            sum(value.numel() for name, value in group.items() if (name in cut) == by_feature)
            for group in ({**parameters, **dict(whole.named_buffers())}, trained)
            for by_feature in (True, False)
        ]
    row_bytes = row_bytes or _FLOAT * d_in
    return Job(
        d_in, sae.d_sae, whole.k_aux, whole.work,
        sharded=count[0], shared=count[1], trained=count[2], trained_shared=count[3],
        plan=make_plan(config, sae), precision=config.precision, row_bytes=row_bytes,
        lanes=config.loader.lanes, window_rows=config.loader.window_rows or WINDOW_BYTES // row_bytes,
        split_rows=split_rows,
    )  # fmt: skip


def estimate(job: Job, mesh: Mesh, machine: Machine, *, dead_share: float = DEAD_SHARE) -> Estimate:
    """Return what a mesh takes on a machine, with a share of the features dead."""
    dead = math.ceil(dead_share * job.d_sae / mesh.feature)
    device = device_bytes(job, mesh, machine, dead)
    host = host_bytes(job, mesh, machine, device)
    whole = _FLOAT * job.sharded
    held, training = sum(device.values()), sum(host.values())
    if machine.device != "cuda":
        held, training = 0.0, held + training
    # besides what training holds: the whole dictionary, which is folded in place and written from there
    end = training - host["checkpoint copy"] + whole
    peak = max(training, end)
    fits = held <= USABLE * machine.memory and peak <= USABLE * machine.host_memory
    sent = _sent(job, mesh, dead)
    read = job.plan.batch_size / mesh.data * job.row_bytes * (not job.in_memory)
    seconds = _seconds(job, mesh, machine, sent, dead) | {
        "reading": read * min(mesh.ranks, machine.ranks) / machine.read
    }
    return Estimate(mesh, device, host, end, peak, sent, read, seconds, fits)


def layouts(job: Job, ranks: int) -> list[Mesh]:
    """Return the meshes of so many ranks that training accepts: shards equal, batches and lanes shared out."""
    data = job.plan.batch_size if job.in_memory else math.gcd(job.lanes, job.plan.batch_size)
    found = (Mesh(d, ranks // d) for d in _divisors(ranks) if data % d == 0)
    return [mesh for mesh in found if job.d_sae % mesh.feature == 0]


def choose(job: Job, machine: Machine, ranks: int) -> tuple[Estimate, list[Estimate]]:
    """Return the mesh with the shortest step among those that fit, and all that were weighed.

    Raises
    ------
    ConfigError
        None fits, or none can be laid out; says the smallest mesh that does.
    """
    weighed = [estimate(job, mesh, machine) for mesh in layouts(job, ranks)]
    fitting = [found for found in weighed if found.fits]
    if fitting:
        return min(fitting, key=lambda found: (found.step_seconds, found.mesh.feature)), weighed
    least = smallest(job, machine)
    need = min((sum(found.device.values()) for found in weighed), default=0.0)
    raise ConfigError(
        f"this training does not fit {ranks} x {machine.name}",
        got=f"at least {need / 2**30:.1f} GiB on a device that holds {USABLE * machine.memory / 2**30:.1f}, "
        f"or more of a host than a rank's {USABLE * machine.host_memory / 2**30:.1f} GiB"
        if weighed
        else f"no mesh of {ranks} ranks whose feature axis divides {job.d_sae} and whose data axis divides the "
        "batch and the loader's lanes",
        expected="a smaller sae.d_sae: no mesh holds it"
        if least is None
        else f"{least.ranks} ranks: data {least.data} x feature {least.feature} is the smallest mesh that fits",
    )


def smallest(job: Job, machine: Machine) -> Mesh | None:
    """Return the mesh of fewest ranks that fits; None if there is none below `MOST_RANKS`."""
    features = [f for f in _divisors(job.d_sae) if f <= MOST_RANKS]
    data = _divisors(job.plan.batch_size if job.in_memory else job.lanes)
    sizes = sorted({d * f for d in data for f in features if d * f <= MOST_RANKS})
    meshes: Iterator[Mesh] = (mesh for size in sizes for mesh in layouts(job, size))
    return next((mesh for mesh in meshes if estimate(job, mesh, machine).fits), None)


def _sent(job: Job, mesh: Mesh, dead: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step by axis, rings as `World.traffic` counts them."""
    rows, features, work = job.plan.batch_size / mesh.data, job.d_sae // mesh.feature, job.work
    d, f, n = _ring(mesh.data), _ring(mesh.feature), mesh.ranks
    others = mesh.feature - 1
    # a look's reconstruction, and on the way back the gradient of what was looked at
    summed = work.reconstructions + 2 * work.looks + (dead > 0)
    along_feature = f * _FLOAT * (rows * job.d_in * summed + (1 + work.looks) * job.d_in)
    candidates = (work.per_row + work.looks) * min(work.active, features) + work.by_rank * work.active
    along_feature += others * _FLOAT * (rows * (candidates + min(job.k_aux, dead)) + work.by_rate * features)
    along_all = 0.0
    if n > 1 and not work.per_row:
        sample = math.ceil(1.5 * work.active * max(1, SAMPLE_ROWS // mesh.data))
        along_all = (n - 1) * _FLOAT * sample + _ring(n) * _COUNTS
    # gradients with the loss, and which features fired; how often; what AuxK's residual has about its mean
    along_data = d * (_FLOAT * (job.trained / mesh.feature + job.trained_shared + 1) + features)
    along_data += d * _COUNT * (work.by_rate * features + (dead > 0) * (job.d_in + 3))
    return {"feature": along_feature, "data": along_data, "all": along_all}


def _seconds(job: Job, mesh: Mesh, machine: Machine, sent: dict[str, float], dead: int) -> dict[str, float]:
    rows, features = job.plan.batch_size / mesh.data, job.d_sae // mesh.feature
    matrix, trained = _FLOAT * features * job.d_in, _FLOAT * job.trained / mesh.feature
    looks = 1 + job.work.looks
    codes = rows * (looks * job.work.active + min(job.k_aux, dead * mesh.feature)) / mesh.feature
    written = looks * rows * features * (1 if machine.device == "cuda" else 3 * _FLOAT)
    # Adam reads four tensors and writes three; gradients are written; the decoder is projected and normalised
    moved = 7 * trained + trained + 5 * matrix + matrix * 1.5 * in_bf16(job, machine)
    moved += 4 * _FLOAT * codes * job.d_in + written + 20 * _FLOAT * rows * job.d_in
    inside = {"feature": mesh.feature <= machine.ranks, "data": mesh.ranks <= machine.ranks}
    inside["all"] = inside["data"]
    return {
        "product": 2 * rows * (looks * features + dead) * job.d_in / machine.matmul,
        "memory": moved / machine.bandwidth,
        **{
            f"{axis} axis": bytes_ / (machine.local if inside[axis] else machine.remote)
            for axis, bytes_ in sent.items()
        },
    }


def _ring(ranks: int) -> float:
    """Return how often a rank sends each byte of what is summed over a ring."""
    return 2 * (ranks - 1) / ranks


def _divisors(number: int) -> list[int]:
    low = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*low, *(number // i for i in low)})
