"""Compiled loops on torch's own threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

THREAD, THREADS = "assay_thread", "assay_threads"
"""What compiled code calls to learn which thread it is, of how many."""

_Number = ctypes.CFUNCTYPE(ctypes.c_int)
_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Team:
    """torch's own threads, by way of the OpenMP runtime that torch is linked with.

    Others would compete with them, since they go on spinning after each of torch's operators. Where that runtime lacks
    GNU's entry point (macOS, Windows), the calling thread does all of the work, with the same result.
    """

    def __init__(self) -> None:
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        runtime: Any = ctypes.CDLL(str(library)) if library.exists() else None
        self._parallel: Callable[..., None] | None = getattr(runtime, "GOMP_parallel", None)
        if self._parallel is None:
            self._numbers = [_Number(lambda: 0), _Number(lambda: 1)]
        else:
            self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            self._parallel.restype = None
            self._numbers = [runtime.omp_get_thread_num, runtime.omp_get_num_threads]
        for name, function in zip((THREAD, THREADS), self._numbers, strict=True):
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)

    def run(self, function: int, argument: int) -> None:
        """Call the function at an address on every thread, with one pointer."""
        if self._parallel is None:
            _Work(function)(argument)
        else:
            self._parallel(function, argument, torch.get_num_threads(), 0)


TEAM = Team()


class Loop:
    """A function of a pointer to numbers, compiled when it is first called.

    Machine code is kept beside the source, or in the user's cache folder, where either can be written to.
    """

    def __init__(self, body: Callable[[Any], None]) -> None:
        # hosts that share a folder may differ in what they can run
        body.__qualname__ += f"_{llvm.get_host_cpu_name()}"
        self.body = body

    @cached_property
    def compiled(self) -> Any:
        """What numba makes of it."""
        signature = types.void(types.CPointer(types.int64))
        try:
            return cfunc(signature, cache=True)(self.body)
        except OSError:  # a full disk
            return cfunc(signature)(self.body)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return cfunc(signature)(self.body)

    def __call__(self, *arguments: int | Tensor) -> None:
        """Run on all threads, with the numbers given and the addresses of the tensors, which are contiguous."""
        assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor))
        numbers = np.array([a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], np.int64)
        TEAM.run(self.compiled.address, numbers.ctypes.data)
