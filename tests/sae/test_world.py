"""Several processes see the same sums and each other's values; one process is the case without a network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sae.errors import ConfigError
from sae.world import World

ROOT = Path(__file__).parents[2]
RANKS = 3

CHILD = """
import torch
from sae.world import World
world = World.from_env("cpu", feature=1)
assert not torch.distributed.is_initialized()
r = world.rank
own = torch.arange(r + 1, dtype=torch.float64).reshape(-1, 1) + 10 * r
everybody = world.all_gather(own)
assert [e.shape[0] for e in everybody] == [1, 2, 3]
for rank, part in enumerate(everybody):
    assert torch.equal(part, torch.arange(rank + 1, dtype=torch.float64).reshape(-1, 1) + 10 * rank)
assert [int(x) for x in world.all_gather(torch.tensor(r))] == [0, 1, 2]
x = torch.tensor([[r, 1], [2, -r]])[:, :1]
assert world.all_reduce(x).tolist() == [[3], [6]] and x.tolist() == [[r], [2]]
assert float(world.all_reduce(torch.tensor(float(r)), "min")) == 0
assert float(world.all_reduce(torch.tensor(float(r)), "max")) == 2
assert world.axes == {"data": 3, "feature": 1} and world.is_main == (r == 0)
print("fine")
"""


@pytest.mark.dist
def test_processes_share_values():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=ROOT, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(RANKS)
    ]  # fmt: skip
    for child in children:
        out, error = child.communicate(timeout=120)
        assert out == "fine\n", error


def test_one_process_needs_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_env("cpu") == World.single("cpu")


def test_ranks_are_laid_out_data_major(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "4")
    world = World.from_env("cpu", feature=3)
    assert (world.rank, world.size, world.axes) == (4, 6, {"data": 2, "feature": 3})
    for change in ({"WORLD_SIZE": "4"}, {"RANK": "6"}, {"RANK": "x"}):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setenv(name, value)
            with pytest.raises(ConfigError):
                World.from_env("cpu", feature=3)
