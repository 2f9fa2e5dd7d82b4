"""What a step frees is there for the next, and goes back in the end."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CHILD = """
import os, resource
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
for parameters, ranks in ((1 << 50, 1), (40 << 20, 1 << 20), (40 << 20, 1)):
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    with kept_memory(parameters):
        new_pages(30)
        print(new_pages(5), usual, end=" ")
print(resident() - held)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator has no such settings")
def test_memory_is_kept_while_training_and_given_back_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    *pages, left = [int(number) for number in done.stdout.split()]
    for kept, usual in (pages[:2], pages[2:4]):
        assert kept > usual / 2, "beyond what the machine has for a rank, they go back at once"
    kept, usual = pages[4:]
    assert kept < usual / 2
    assert left < 20 << 10, "KiB: half of one such block"


HOLES = """
from pathlib import Path
import torch
from train.allocation import give_back, kept_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

with kept_memory(0):
    blocks = [torch.ones(1 << 20) for _ in range(32)]
    full = resident()
    del blocks[:31]
    kept = resident()
    give_back()
    print(full - kept, full - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator has no such call")
def test_what_is_free_goes_back_when_no_step_will_ask_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    before, after = [int(number) for number in done.stdout.split()]
    assert before < 4 << 10 and after > 100 << 10, "KiB, of 124 MiB below a block that is in use"
