"""Under torchrun: a rank that is killed is replaced and nothing is lost; a rank that never comes is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.distributed.job import work
from tests.distributed.pool import free_port

ROOT = Path(__file__).parents[2]
STEPS = 60


def torchrun(folder: Path, *given: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `tests.distributed.job` under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", "3", "--monitor-interval", "0.1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return subprocess.run(
        [*command, "-m", "tests.distributed.job", str(folder), *given],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_a_killed_rank_is_recovered_with_the_same_bits(pool_of, tmp_path):
    pool_of((2, 1)).run(work, tmp_path / "whole", STEPS, mesh=(2, 1))
    done = torchrun(tmp_path / "killed", "--steps", str(STEPS), "--kill-rank", "1", "--kill-at", "37")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed" / "killed").read_text() == "rank 1 at step 37"
    whole, killed = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] == killed[name]).all() for name in whole)


def test_a_rank_that_never_comes_is_named_by_those_who_wait(tmp_path):
    code = """
import sys, time, torch
from sae.world import ProcessWorld
rank, port = int(sys.argv[1]), sys.argv[2]
import os
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
world = ProcessWorld(rank, 2, torch.device("cpu"), {"data": 1, "feature": 2}, 3.0)
world.all_reduce(torch.ones(2), axis="feature")
if rank == 1:
    sys.stdin.read()
world.stack(torch.ones(4, 3), axis="feature")
"""
    port = str(free_port())
    one, other = (
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    )  # fmt: skip
    try:
        _, error = one.communicate(timeout=60)
    finally:
        other.kill()
        other.communicate()
    assert one.returncode == 1
    assert "rank 0 of 2 waited in vain, at most 3 s" in error
    assert "all_gather of (4, 3) along feature" in error
