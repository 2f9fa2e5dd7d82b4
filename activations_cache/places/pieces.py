"""Pieces of memory, given by address, that are filled one after the other from what lies together.

One system call fills a thousand of them. Lists of buffers, as `os.preadv` takes them, cost more to make than rows
of a few kilobytes cost to copy. Whoever makes addresses keeps the memory alive until it is filled.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt8

Pieces = Int64[np.ndarray, "n 2"]
"""Address and bytes of each piece: what the system calls iovec."""

_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_preadv.restype = ctypes.c_ssize_t
# holds on to the interpreter's lock: giving it up for every piece costs more than the pieces
_memmove = ctypes.PyDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None
_AT_ONCE = os.sysconf("SC_IOV_MAX")


def pieces_of(arrays: Sequence[np.ndarray]) -> Pieces:
    """Return the memory of C-contiguous arrays."""
    assert all(array.flags.carray for array in arrays)
    return np.array([(array.ctypes.data, array.nbytes) for array in arrays], np.int64).reshape(-1, 2)


def read_pieces(fd: int, pieces: Pieces, offset: int) -> int:
    """Fill pieces from an open file, from `offset` on, and return how many bytes it lacks.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    assert pieces.flags.c_contiguous
    want, done, left = int(pieces[:, 1].sum()), 0, pieces
    while done < want:
        got = _preadv(fd, left.ctypes.data, min(len(left), _AT_ONCE), offset + done)
        if got == 0:
            break
        if got < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            raise OSError(number, os.strerror(number))
        done += got
        left = _without(left, got) if done < want else left
    return want - done


def _without(pieces: Pieces, size: int) -> Pieces:
    """Return what is left of pieces, some of it, after their first `size` bytes."""
    ends = np.cumsum(pieces[:, 1])
    first = int(np.searchsorted(ends, size, side="right"))
    left, rest = pieces[first:].copy(), int(ends[first]) - size
    left[0] = left[0].sum() - rest, rest
    return left


def copy_pieces(data: UInt8[np.ndarray, " bytes"], pieces: Pieces) -> None:
    """Fill pieces from memory that is as long as all of them."""
    assert data.flags.c_contiguous and data.nbytes == pieces[:, 1].sum()
    start = data.ctypes.data
    for address, size in pieces.tolist():
        _memmove(address, start, size)
        start += size
