"""Who else computes: ranks, the two mesh axes and the device, as a value that is passed in."""

from __future__ import annotations

import atexit
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from .autograd_collectives import DataGather, FeatureShared, FeatureSum
from .errors import ConfigError
from .rendezvous import shared_store

Axis = Literal["data", "feature"]
Reduction = Literal["sum", "min", "max"]

TIMEOUT = 600.0
"""Seconds that a rank waits for the others unless told otherwise; a step takes less than one."""

_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


class CollectiveError(RuntimeError):
    """A rank waited in vain for the others: which rank, which call, along which axis, for how long."""


@dataclass(frozen=True)
class World:
    """The processes that share one job.

    Every collective is called by every rank, whatever its own data; one process is the case in which each
    returns its argument. Without an axis a collective is over all ranks. What is the same on all ranks of an
    axis must not be summed along it: rows are counted along `data`, features along `feature`, codes over both.

    Attributes
    ----------
    rank, size
        This process and how many there are.
    device
        Where tensors of the job live.
    axes
        Ranks along each mesh axis: `data` (ranks see different rows) and `feature` (ranks hold different rows
        of W_enc and W_dec); their product is `size`.
    timeout
        Seconds that a collective waits for the other ranks.
    traffic
        Bytes that this rank has sent so far, by (axis, operation).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    axes: dict[Axis, int] = field(default_factory=lambda: {"data": 1, "feature": 1})
    timeout: float = TIMEOUT
    traffic: Counter[tuple[str, str]] = field(default_factory=Counter, compare=False, repr=False)

    @staticmethod
    def single(device: str = "auto") -> World:
        """Return the world of one process.

        Raises
        ------
        ConfigError
            The device does not exist on this machine.
        """
        return World(device=find_device(device))

    @staticmethod
    def from_env(device: str = "auto", *, feature: int = 1, timeout: float = TIMEOUT) -> World:
        """Return the world of the processes that `torchrun` started, or of one process without it.

        Parameters
        ----------
        device
            As for `single`; where there are several GPUs each process of a machine gets its own.
        feature
            Ranks along the `feature` axis. Ranks count through it first: rank = data * feature + feature's own.
        timeout
            Seconds that a collective waits for the other ranks.

        Raises
        ------
        ConfigError
            The environment is incomplete, or the ranks cannot be laid out on the axes.
        """
        try:
            rank, size, local = (int(os.environ.get(name, given)) for name, given in _ENVIRONMENT.items())
        except ValueError as error:
            raise ConfigError(
                "the environment does not say which process this is",
                got=str(error),
                do="start it with torchrun",
            ) from error
        if not 0 <= rank < size or feature < 1 or size % feature:
            raise ConfigError(
                "the processes cannot be laid out",
                got=f"rank {rank} of {size}, {feature} along the feature axis",
                expected="a number of processes that the feature axis divides",
            )
        if size == 1:
            return World.single(device)
        place = find_device(device)
        if place.type == "cuda" and place.index is None:
            place = find_device(f"cuda:{local}")
        return ProcessWorld(rank, size, place, {"data": size // feature, "feature": feature}, timeout)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def coordinate(self, axis: Axis) -> int:
        """Return this rank's place along an axis."""
        feature = self.axes["feature"]
        return self.rank % feature if axis == "feature" else self.rank // feature

    def all_reduce(self, value: Tensor, op: Reduction = "sum", *, axis: Axis | None = None) -> Tensor:
        """Return the sum, minimum or maximum of `value` over all ranks, or over those of an axis."""
        return value

    def sum_(self, value: Tensor, *, axis: Axis) -> None:
        """Replace a contiguous `value` by its sum along an axis, in place."""

    def all_gather(self, value: Tensor, *, axis: Axis | None = None) -> list[Tensor]:
        """Return every rank's `value`, by rank; they may differ in length."""
        return [value]

    def stack(self, value: Tensor, *, axis: Axis | None = None) -> Tensor:
        """Return every rank's `value`, all of one shape, as one tensor with a first dimension of ranks."""
        return value[None]

    def data_gather(self, value: Tensor) -> Tensor:
        """Return every rank's rows along `data`, one after the other; the ranks' gradients of them are summed."""
        return value

    def feature_sum(self, value: Tensor) -> Tensor:
        """Return the sum of the shards' parts of something whole; the gradient of the whole goes to each."""
        return value

    def feature_shared(self, value: Tensor) -> Tensor:
        """Return what all shards hold, for use on own features; the shards' gradients are summed."""
        return value


ALONE = World()
"""One process on the CPU."""


@dataclass(frozen=True)
class ProcessWorld(World):
    """Several processes; they connect at the first collective, so a job without one needs no network.

    No gradient flows through a collective, but for `data_gather`, `feature_sum` and `feature_shared`.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessWorld:
        return self

    def all_reduce(self, value: Tensor, op: Reduction = "sum", *, axis: Axis | None = None) -> Tensor:
        """Return the sum, minimum or maximum of `value` over all ranks, or over those of an axis."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        self._reduce(total, op, axis)
        return total

    def sum_(self, value: Tensor, *, axis: Axis) -> None:
        """Replace a contiguous `value` by its sum along an axis, in place."""
        self._reduce(value, "sum", axis)

    def all_gather(self, value: Tensor, *, axis: Axis | None = None) -> list[Tensor]:
        """Return every rank's `value`, by rank; they may differ in length."""
        own = value.detach().contiguous()
        if own.ndim == 0:
            return list(self.stack(own, axis=axis))
        lengths = self.stack(torch.tensor(len(own), device=own.device), axis=axis).tolist()
        padded = own.new_zeros((max(lengths), *own.shape[1:]))
        padded[: len(own)] = own
        parts = self.stack(padded, axis=axis)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def stack(self, value: Tensor, *, axis: Axis | None = None) -> Tensor:
        """Return every rank's `value`, all of one shape, as one tensor with a first dimension of ranks."""
        own = value.detach().contiguous()
        ranks = self._ranks(axis)
        if ranks == 1:
            return own[None]
        parts = [torch.empty_like(own) for _ in range(ranks)]
        self._call("all_gather", own, axis, lambda group: distributed.all_gather(parts, own, group))
        self._count("all_gather", axis, (ranks - 1) * own.nbytes)
        return torch.stack(parts)

    def data_gather(self, value: Tensor) -> Tensor:
        """Return every rank's rows along `data`, one after the other; the ranks' gradients of them are summed."""
        return DataGather.apply(value, self)  # type: ignore[no-untyped-call, no-any-return]

    def feature_sum(self, value: Tensor) -> Tensor:
        """Return the sum of the shards' parts of something whole; the gradient of the whole goes to each."""
        return FeatureSum.apply(value, self)  # type: ignore[no-untyped-call, no-any-return]

    def feature_shared(self, value: Tensor) -> Tensor:
        """Return what all shards hold, for use on own features; the shards' gradients are summed."""
        return FeatureShared.apply(value, self)  # type: ignore[no-untyped-call, no-any-return]

    def _reduce(self, value: Tensor, op: Reduction, axis: Axis | None) -> None:
        ranks = self._ranks(axis)
        if ranks == 1:
            return
        kind = getattr(distributed.ReduceOp, op.upper())
        self._call("all_reduce", value, axis, lambda group: distributed.all_reduce(value, kind, group))
        # what a ring sends: every rank passes on each part but one, twice
        self._count("all_reduce", axis, 2 * (ranks - 1) * value.nbytes // ranks)

    def _ranks(self, axis: Axis | None) -> int:
        return self.size if axis is None else self.axes[axis]

    def _count(self, name: str, axis: Axis | None, sent: int) -> None:
        self.traffic[axis or "all", name] += sent

    def _call(self, name: str, value: Tensor, axis: Axis | None, collective: Callable[[Any], None]) -> None:
        """Run a collective; say which it was where the others do not come."""
        try:
            collective(self._groups[axis])
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {self.rank} of {self.size} waited in vain, at most {self.timeout:g} s, for the other "
                f"ranks in {name} of {tuple(value.shape)} along {axis or 'all ranks'}: "
                f"{str(error).splitlines()[0]}"
            ) from error

    @cached_property
    def _groups(self) -> dict[Axis | None, Any]:
        """Connect, once; every rank takes part in making every group."""
        limit = timedelta(seconds=self.timeout)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not distributed.is_initialized():
            distributed.init_process_group(
                backend, rank=self.rank, world_size=self.size, timeout=limit,
                store=shared_store(self.rank, self.size, timeout=self.timeout),
                device_id=self.device if backend == "nccl" else None,
            )  # fmt: skip
            atexit.register(_leave)
        feature = self.axes["feature"]
        starts = range(0, self.size, feature)
        lines: dict[Axis, list[list[int]]] = {
            "feature": [list(range(start, start + feature)) for start in starts],
            "data": [list(range(own, self.size, feature)) for own in range(feature)],
        }
        groups: dict[Axis | None, Any] = {None: distributed.group.WORLD}
        for axis, members in lines.items():
            made = [distributed.new_group(ranks, timeout=limit, backend=backend) for ranks in members]
            groups[axis] = made[next(i for i, ranks in enumerate(members) if self.rank in ranks)]
        return groups


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def find_device(name: str = "auto") -> torch.device:
    """Return the named device, or for `auto` the best one that this machine has.

    Raises
    ------
    ConfigError
        The device is unknown to torch or absent.
    """
    if name == "auto":
        # mps is left out: it has no float64, which the statistics are computed in
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used here", got=reason, expected="auto, cpu, cuda, cuda:1"
        ) from error
    return device
