"""What a step frees is there for the next, and goes back in the end."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CHILD = """
import resource, sys
import torch
from train.allocation import kept_memory

def new_pages(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

new_pages(1)
usual, held = new_pages(5), resident()
with kept_memory(int(sys.argv[1])):
    new_pages(30)
    print(new_pages(5), usual)
print(resident() - held)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator has no such settings")
def test_memory_is_kept_while_training_and_given_back_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(parameters: int, ranks: int = 1) -> list[int]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        command = [sys.executable, "-c", CHILD, str(parameters)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    kept, usual, left = run(40 << 20)
    assert kept < usual / 2
    assert left < 20 << 10, "KiB: half of one such block"
    for parameters, ranks in ((1 << 50, 1), (40 << 20, 1 << 20)):
        kept, usual, _ = run(parameters, ranks)
        assert kept > usual / 2, "beyond what the machine has for a rank, they go back at once"
