"""Number formats on disk: to and from float32, and which values do not fit.

Casts go through torch in pieces below its grain size, so that each runs in the calling thread: ten times as
fast as numpy's half precision, and no pool of threads that stalls when the machine is busy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Float32, Shaped

from sae.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 32000
_LONG_ROW = 4096
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
    if x.size == 0 or float(largest_magnitude(x).view(x.dtype)) < limit:
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


def largest_magnitude(x: Shaped[np.ndarray, "rows d_in"], axis: Literal[0] | None = None) -> np.ndarray:
    """Return the bits of the largest absolute value as unsigned integers; what is not a number is largest of all.

    Floats of one sign are ordered as their bits are, in every format.

    Parameters
    ----------
    x
        At least one row of floats, or their bits.
    axis
        0 for that of each dimension.
    """
    size, width = x.itemsize, x.shape[1]
    if axis == 0 and x.flags.c_contiguous:
        # long rows take less time by value
        fold = math.gcd(len(x), max(1, _LONG_ROW // width))
        x = x.reshape(len(x) // fold, -1)
    positive, negative = x.view(f"i{size}").max(axis=axis), x.view(f"u{size}").max(axis=axis)
    sign = negative.dtype.type(1 << (8 * size - 1))
    largest: np.ndarray = np.maximum(
        np.maximum(positive, 0).astype(negative.dtype), np.where(negative < sign, 0, negative ^ sign)
    )
    return largest if axis is None else largest.reshape(-1, width).max(axis=0)


def _cast(source: np.ndarray, target: np.ndarray, source_dtype: str, target_dtype: str) -> None:
    import torch

    given, wanted = as_tensor(source, source_dtype).view(-1), as_tensor(target, target_dtype).view(-1)
    # one call: threads that call often wait for each other
    starts = range(0, len(given), _PIECE)
    if starts:
        torch._foreach_copy_(
            [wanted[i : i + _PIECE] for i in starts], [given[i : i + _PIECE] for i in starts]
        )
