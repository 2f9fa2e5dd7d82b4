"""Who else computes: ranks, the two mesh axes and the device, as a value that is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError

Axis = Literal["data", "feature"]


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


def find_device(name: str = "auto") -> torch.device:
    """Return the named device, or for `auto` the best one that this machine has.

    Raises
    ------
    ConfigError
        The device is unknown to torch or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here", got=reason, expected="auto, cpu, cuda, cuda:1, mps") from error
    return device
