"""Processes that are started once and run one check after another together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

import tests.conftest  # noqa: F401 - shape checks, in the processes too
from sae.world import ProcessWorld

PATIENCE = 300
"""Seconds that a check may take; on a busy machine every collective waits for its turn."""

Mesh = tuple[int, int]
"""Ranks along `data` and along `feature`."""


class Pool:
    """Processes connected by gloo; a check is a function of a world, called by all of them.

    Parameters
    ----------
    size
        Number of processes.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._children = []
        port = free_port()
        for rank in range(size):
            mine, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            child.start()
            self._ends.append(mine)
            self._children.append(child)

    def run(self, check: Callable[..., Any], *given: Any, mesh: Mesh) -> list[Any]:
        """Call `check(world, *given)` on every process; return the results by rank."""
        for end in self._ends:
            end.send_bytes(pickle.dumps((check, given, mesh)))
        results, errors = [], []
        for rank, end in enumerate(self._ends):
            if not end.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"rank {rank} does not answer {check.__name__}")
            fine, result = pickle.loads(end.recv_bytes())
            results.append(result)
            if not fine:
                errors.append(f"rank {rank}:\n{result}")
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.kill()
            child.join()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _serve(end: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    worlds: dict[Mesh, ProcessWorld] = {}
    while True:
        try:
            check, given, mesh = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        if mesh not in worlds:
            axes = {"data": mesh[0], "feature": mesh[1]}
            worlds[mesh] = ProcessWorld(rank, size, torch.device("cpu"), axes, PATIENCE / 2)
        try:
            answer = True, check(worlds[mesh], *given)
        except Exception:
            answer = False, traceback.format_exc()
        end.send_bytes(pickle.dumps(answer))
