"""Where the processes of one job leave word for each other: the key-value store that `torchrun` keeps."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import ConfigError


def shared_store(rank: int, size: int, *, timeout: float) -> Any:
    """Return this start's part of the store: what an earlier start left there is not in it.

    A static torchrun keeps one store over its restarts, where a restarted process would find the addresses and the
    last words of the dead. On one host every process has seen as many restarts, so each restart can have a part of
    its own; over several hosts the counts differ, and torchrun's c10d rendezvous gives each round a new store.

    Parameters
    ----------
    rank, size
        This process and how many there are.
    timeout
        Seconds that a process waits for the others.

    Returns
    -------
    torch.distributed.Store

    Raises
    ------
    ConfigError
        The store cannot be reached.
    """
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "this process cannot reach the others",
            got=str(error).splitlines()[0],
            do="start it with torchrun",
        ) from error
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
