"""What a step frees is there for the next, and goes back in the end."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CHILD = """
import resource
import torch
from train.allocation import kept_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(20 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

torch.ones(20 << 20)
usual, held = new_pages(), resident()
with kept_memory():
    torch.ones(20 << 20)
    print(new_pages(), usual)
print(resident() - held)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator has no such settings")
def test_memory_is_kept_while_training_and_given_back_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    kept, usual, left = (int(number) for number in done.stdout.split())
    assert kept < usual / 2
    assert left < 40 << 10, "KiB: half of one such block"
