"""Who else computes: ranks, the two mesh axes and the device, as a value that is passed in."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, distributed

from .errors import ConfigError

Axis = Literal["data", "feature"]

_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class World:
    """The processes that share one job.

    Every collective is called by every rank, whatever its own data; one process is the case in which each
    returns its argument.

    Attributes
    ----------
    rank, size
        This process and how many there are.
    device
        Where tensors of the job live.
    axes
        Ranks along each mesh axis: `data` (ranks see different rows) and `feature` (ranks hold different rows
        of W_enc and W_dec); their product is `size`.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    axes: dict[Axis, int] = field(default_factory=lambda: {"data": 1, "feature": 1})

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
    def from_env(device: str = "auto", *, feature: int = 1) -> World:
        """Return the world of the processes that `torchrun` started, or of one process without it.

        Parameters
        ----------
        device
            As for `single`; where there are several GPUs each process of a machine gets its own.
        feature
            Ranks along the `feature` axis. Ranks count through it first: rank = data * feature + feature's own.

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
        return ProcessWorld(rank, size, place, {"data": size // feature, "feature": feature})

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def all_reduce(self, value: Tensor, op: Literal["sum", "min", "max"] = "sum") -> Tensor:
        """Return the sum, minimum or maximum of `value` over all ranks."""
        return value

    def all_gather(self, value: Tensor) -> list[Tensor]:
        """Return every rank's `value`, by rank."""
        return [value]


@dataclass(frozen=True)
class ProcessWorld(World):
    """Several processes; they connect at the first collective, so a job without one needs no network.

    No gradient flows through a collective.
    """

    def all_reduce(self, value: Tensor, op: Literal["sum", "min", "max"] = "sum") -> Tensor:
        """Return the sum, minimum or maximum of `value` over all ranks."""
        self._connect()
        total = value.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, getattr(distributed.ReduceOp, op.upper()))
        return total

    def all_gather(self, value: Tensor) -> list[Tensor]:
        """Return every rank's `value`, by rank; they may differ in length."""
        self._connect()
        own = value.detach().contiguous()
        if own.ndim == 0:
            return [part[0] for part in self._gather(own[None])]
        lengths = torch.cat(self._gather(torch.tensor([len(own)], device=own.device))).tolist()
        padded = own.new_zeros((max(lengths), *own.shape[1:]))
        padded[: len(own)] = own
        return [part[:length] for part, length in zip(self._gather(padded), lengths, strict=True)]

    def _gather(self, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.size)]
        distributed.all_gather(parts, value)
        return parts

    def _connect(self) -> None:
        if not distributed.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, rank=self.rank, world_size=self.size)
            atexit.register(distributed.destroy_process_group)


def find_device(name: str = "auto") -> torch.device:
    """Return the named device, or for `auto` the best one that this machine has.

    Raises
    ------
    ConfigError
        The device is unknown to torch or absent.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used here", got=reason, expected="auto, cpu, cuda, cuda:1, mps"
        ) from error
    return device
