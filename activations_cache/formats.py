"""Number formats on disk: to and from float32, and which values do not fit.

Casts go through torch in pieces below its grain size, so that each runs in the calling thread: ten times as
fast as numpy's half precision, and no pool of threads that stalls when the machine is busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Shaped

from sae.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 32000
_ROUNDS_TO_INFINITY = {"float32": 2.0**128 - 2.0**103, "float16": 65520.0, "bfloat16": 2.0**128 - 2.0**119}


def to_float32(
    rows: Shaped[np.ndarray, "rows d_in"], dtype: str, out: Float32[np.ndarray, "rows d_in"] | None = None
) -> Float32[np.ndarray, "rows d_in"]:
    """Return stored rows as float32, exactly.

    Parameters
    ----------
    rows
        Rows as stored.
    dtype
        What they stand for: float32, float16 or bfloat16.
    out
        Where to put them; a new array by default, or `rows` itself if it is float32 already.
    """
    if dtype == "float32" and out is None:
        return rows
    out = np.empty(rows.shape, np.float32) if out is None else out
    _cast(np.ascontiguousarray(rows), out, dtype, "float32")
    return out


def as_tensor(rows: Shaped[np.ndarray, "..."], dtype: str) -> Tensor:
    """Return stored rows as a tensor of what they stand for, in the same memory."""
    import torch

    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def as_array(tensor: Tensor) -> Shaped[np.ndarray, "..."]:
    """Return a tensor's memory in the format on disk: the other way round."""
    import torch

    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_stored(x: Float[np.ndarray, "rows d_in"], out: Shaped[np.ndarray, "rows d_in"], dtype: str) -> None:
    """Write activations into a C-contiguous array of the format on disk, to nearest, ties to even."""
    if x.dtype == out.dtype:
        np.copyto(out, x)
    else:
        _cast(np.require(x, requirements=["C", "W"]), out, str(x.dtype), dtype)


def check_range(
    hook: str,
    x: Float[np.ndarray, "rows d_in"],
    dtype: str,
    columns: Mapping[str, Shaped[np.ndarray, " rows"]],
) -> None:
    """Check that every value stays finite on disk.

    Raises
    ------
    StoreError
        One is not; the message says which hook, entity, position and time.
    """
    limit = _ROUNDS_TO_INFINITY[dtype]
    if x.size == 0 or _largest(x) < limit:
        return
    row, dimension = np.argwhere(~(np.abs(x.astype(np.float64)) < limit))[0].tolist()
    value = float(x[row, dimension])
    who = ", ".join(f"{name} {column[row]}" for name, column in columns.items())
    finite = bool(np.isfinite(value))
    raise StoreError(
        f"an activation of hook {hook} {f'does not fit {dtype}' if finite else 'is not finite'}: {who}",
        got=f"{value} in dimension {dimension}",
        expected=f"an absolute value below {limit:.6g}",
        do="harvest with dtype float32 or bfloat16" if finite else "look at the model's input for this row",
    )


def _largest(x: Float[np.ndarray, "rows d_in"]) -> float:
    """Return the largest absolute value; not a number if there is one that is not."""
    if x.dtype == np.float16:
        bits = np.ascontiguousarray(x).view(np.uint16).reshape(-1)
        # in pieces, so that what is made on the way stays in the cache
        largest = max(
            int(np.bitwise_and(bits[i : i + _PIECE], 0x7FFF).max()) for i in range(0, len(bits), _PIECE)
        )
        return float(np.asarray(largest, np.uint16).view(np.float16))
    return float(np.maximum(x.max(), -x.min()))


def _cast(source: np.ndarray, target: np.ndarray, source_dtype: str, target_dtype: str) -> None:
    given, wanted = as_tensor(source, source_dtype).view(-1), as_tensor(target, target_dtype).view(-1)
    for i in range(0, len(given), _PIECE):
        wanted[i : i + _PIECE].copy_(given[i : i + _PIECE])
