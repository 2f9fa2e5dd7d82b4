"""Compiled loops on torch's threads."""

import subprocess
import sys

import pytest
import torch

from sae.kernels import find_kernels
from sae.kernels.loops import LOOPS
from sae.kernels.threads import Loop

SELECTION = """
import ctypes, sys, torch
open_library = ctypes.CDLL
if "none" in sys.argv:
    ctypes.CDLL = lambda path, *a, **k: object() if "torch_cpu" in str(path) else open_library(path, *a, **k)
import sae.kernels.threads
ctypes.CDLL = open_library
from sae.kernels import find_kernels
generator = torch.Generator().manual_seed(0)
x, W, b = (torch.randn(*shape, generator=generator) for shape in ((700, 8), (96, 8), (96,)))
codes = find_kernels("cpu").select_rows(x, W, b, k=5)
print(sae.kernels.threads.TEAM._parallel is None, codes.features.sum().item(), codes.values.sum().item())
"""


def test_without_an_openmp_runtime_of_gnus_kind_one_thread_does_the_same():
    usual, none = (
        subprocess.run(
            [sys.executable, "-c", SELECTION, how], check=True, capture_output=True, text=True
        ).stdout.split()
        for how in ("usual", "none")
    )
    assert none[0] == "True" and (usual[0] == "False" or not sys.platform.startswith("linux"))
    assert usual[1:] == none[1:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_number_of_threads_changes_nothing(precision):
    kernels = find_kernels("cpu", precision=precision)
    generator = torch.Generator().manual_seed(0)
    # small integers, whose products are the same however many threads multiply
    x, W, b = (
        torch.randint(-9, 9, shape, generator=generator).float() for shape in ((700, 8), (96, 8), (96,))
    )
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            found.append(
                (kernels.select_rows(x, W, b, k=5), kernels.select_above(x, W, b, threshold=b.abs()))
            )
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_code_that_can_be_kept_nowhere_is_compiled_all_the_same():
    names: dict = {}
    exec("def body(p):\n    p[0] = 2", names)  # of no file, so that numba finds no folder for it
    loop = Loop(names["body"])
    loop(7)
    assert not loop.compiled.cache_hits and type(loop.compiled._cache).__name__ == "NullCache"


def test_a_full_disk_is_no_reason_to_stop(monkeypatch, tmp_path):
    source = tmp_path / "loop.py"
    source.write_text("def body(p):\n    p[0] = 3\n")
    names: dict = {}
    exec(compile(source.read_text(), str(source), "exec"), names)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    loop = Loop(names["body"])
    loop(7)
    assert loop.compiled.address


def test_loops_of_one_name_are_kept_apart():
    names = {
        getattr(loops, name).body.__qualname__ for loops in LOOPS.values() for name in ("propose", "count")
    }
    assert len(names) == 4


def test_what_is_not_contiguous_is_refused():
    with pytest.raises(AssertionError):
        Loop(lambda p: None)(torch.zeros(4, 4).T)
