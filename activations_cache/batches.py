"""Memory for batches: pinned where they go on to a GPU, else used again once nobody looks at it."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .formats import as_tensor
from .schema import COLUMNS, ArraySpec

_STRETCH_BYTES = 16 << 20


class Recycler:
    """Gives out arrays again once nothing uses their memory, which spares the making of new pages.

    A tensor made from an array holds a reference to it for as long as any view or graph needs the memory, so
    the count of references tells. Beyond `kept` arrays of one name, new ones are made and not kept.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._arrays: dict[str, deque[np.ndarray]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an array with any content; all of one name have the same shape."""
        arrays = self._arrays.setdefault(name, deque())
        for _ in range(len(arrays)):
            # the one that was given out first is most likely free
            arrays.rotate(-1)
            if _references(arrays, -1) <= _UNUSED:
                return arrays[-1]
        if len(arrays) == self._kept:
            return np.empty(shape, dtype)
        # small arrays many at once: the system maps a large stretch of memory in far fewer steps
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        many = max(1, min(self._kept - len(arrays), _STRETCH_BYTES // size))
        arrays.extendleft(np.empty((many, *shape), dtype))
        arrays.rotate(-1)
        return arrays[-1]


def _references(items: Sequence[object], i: int) -> int:
    return sys.getrefcount(items[i])


_UNUSED = _references(deque([object()]), -1)


class BatchMemory:
    """Makes batches, which others fill.

    Parameters
    ----------
    specs
        The arrays of a batch, by name.
    rows
        Rows of a batch.
    device
        Where its activations go.
    kept
        How many batches are in use at once, as a rule.
    """

    def __init__(self, specs: Mapping[str, ArraySpec], rows: int, device: torch.device, *, kept: int) -> None:
        self._specs, self._rows = dict(specs), rows
        self._pinned = device.type == "cuda"
        self._recycler = Recycler(kept)

    def empty(self) -> dict[str, Tensor]:
        """Return a batch with any content, in the format on disk."""
        return {name: self._array(name, spec) for name, spec in self._specs.items()}

    def _array(self, name: str, spec: ArraySpec) -> Tensor:
        shape = (self._rows, *spec.row_shape)
        if self._pinned and name not in COLUMNS:
            # torch's own allocator knows when an asynchronous copy has ended
            dtype = as_tensor(np.empty(0, spec.dtype), spec.logical_dtype).dtype
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return as_tensor(self._recycler.take(name, shape, spec.dtype), spec.logical_dtype)
