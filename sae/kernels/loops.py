"""What numba compiles for the CPU: loops over pre-activations and codes, each thread over its own rows.

Floats are compared by their keys: integers of the same width in the same order, both zeros alike, NaN the largest. Arrays
are cut before they are looped over from 0, else numba allows for negative places and does not vectorise. All that is
compiled stands in this file, because by its date numba knows whether what it has kept is still true.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .threads import THREAD, THREADS, Loop

BLOCK = 32
"""Columns that are compared at once, one bit each."""

LANES = 128
"""Keys that are searched are filled up to a multiple, so that no few of them are left to be counted one by one."""

STRIP = 512
"""Columns that are counted in numbers as narrow as a key, which is twice as fast or more."""

INFINITY = {16: 0x7F80, 32: 0x7F800000}
"""Its key, by the bits of a float."""

SLACK = 8
"""A bound may let an eighth more than k through, which spares half of the search for it."""

_thread = types.ExternalFunction(THREAD, types.int32())
_threads = types.ExternalFunction(THREADS, types.int32())


@intrinsic
def _pointer(context, address):
    return types.voidptr(types.int64), lambda _, builder, __, args: builder.inttoptr(
        args[0], cgutils.voidptr_t
    )


@intrinsic
def _lowest(context, mask):
    """Return the place of the lowest bit that is set."""

    def code(_, builder, __, args):
        return builder.zext(builder.cttz(args[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(types.uint32), code


@njit
def _part(n):
    """Return the rows of n that are this thread's."""
    me, everyone = _thread(), _threads()
    return range(n * me // everyone, n * (me + 1) // everyone)


def _key(bits):
    """Return the key of a float, given its bits."""


@overload(_key)
def _key_of(bits):
    narrow = {16: np.int16, 32: np.int32}[bits.bitwidth]
    largest, infinity = np.iinfo(narrow).max, INFINITY[bits.bitwidth]

    def key(bits):
        size = narrow(bits & narrow(largest))
        signed = bits if bits >= 0 else narrow(-size)
        return narrow(largest) if size > narrow(infinity) else signed

    return key


def _limits(bounds, start, n):
    """Return what n columns are compared with: one bound for all of the row, or each column's own."""


@overload(_limits)
def _limits_of(bounds, start, n):
    if isinstance(bounds, types.Array):
        return lambda bounds, start, n: bounds[start : start + n]
    return lambda bounds, start, n: bounds


def _limit(limits, column):
    """Return what one of them is compared with."""


@overload(_limit)
def _limit_of(limits, column):
    if isinstance(limits, types.Array):
        return lambda limits, column: limits[column]
    return lambda limits, column: limits


@njit
def _count(row, bounds):
    """Return how many of a row's keys reach their bound."""
    found = 0
    for start in range(0, len(row), STRIP):
        part, own = row[start : start + STRIP], row.dtype.type(0)
        limits = _limits(bounds, start, STRIP)
        for j in range(len(part)):
            own = row.dtype.type(own + row.dtype.type(_key(part[j]) >= _limit(limits, j)))
        found += own
    return found


@njit
def _room(n, number):
    """Return memory for n keys, filled up with what reaches no bound."""
    return np.full(-(-n // LANES) * LANES, np.iinfo(number).min, number)


@njit
def _reaching(keys, bound):
    """Return how many of the keys reach a bound."""
    found = 0
    for start in range(0, len(keys), STRIP):
        part, own = keys[start : start + STRIP], keys.dtype.type(0)
        for j in range(len(part)):
            own = keys.dtype.type(own + keys.dtype.type(part[j] >= bound))
        found += own
    return found


@njit
def _bound(keys, k, most, least):
    """Return a bound that k to `most` keys reach, or more in a tie; `least` if `most` or fewer reach that."""
    if _reaching(keys, least) <= most:
        return least
    largest = least
    for j in range(len(keys)):
        largest = max(largest, keys[j])
    low, high = np.int64(least), np.int64(largest) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        found = _reaching(keys, keys.dtype.type(middle))
        if found < k:
            high = middle
        else:
            low = middle
            if found <= most:
                break
    return keys.dtype.type(low)


@njit
def _gather(row, bounds, place, features, values):
    """Write the columns that reach their bound, and what stands there, from a place on."""
    for start in range(0, len(row), BLOCK):
        part, limits = row[start : start + BLOCK], _limits(bounds, start, BLOCK)
        mask = np.uint32(0)
        if len(part) == BLOCK:
            some = row.dtype.type(0)
            for j in range(BLOCK):
                some = row.dtype.type(some | row.dtype.type(_key(part[j]) >= _limit(limits, j)))
            if some:
                for j in range(BLOCK):
                    mask |= np.uint32(np.uint32(_key(part[j]) >= _limit(limits, j)) << np.uint32(j))
        else:
            for j in range(len(part)):
                mask |= np.uint32(np.uint32(_key(part[j]) >= _limit(limits, j)) << np.uint32(j))
        while mask:
            j = _lowest(mask)
            mask &= np.uint32(mask - np.uint32(1))
            features[place] = start + j
            if len(values):
                values[place] = part[j]
            place += 1


def _make_propose(number):
    @Loop
    def propose(p):
        """Bound the k largest of each row from below, and count what reaches that; a tile is every n-th column."""
        rows, width, tiles, k, least, pre, bounds, counts = carray(p, 8)
        pre = carray(_pointer(pre), (rows, width), number)
        bounds = carray(_pointer(bounds), rows, number)
        counts = carray(_pointer(counts), rows, np.int64)
        maxima = _room(tiles, number)
        for r in _part(rows):
            row = pre[r]
            for j in range(tiles):
                maxima[j] = _key(row[j])
            for start in range(tiles, width, tiles):
                part = row[start : start + tiles]
                for j in range(len(part)):
                    maxima[j] = max(_key(part[j]), maxima[j])
            bounds[r] = _bound(maxima, k, k + k // SLACK, number(least))
            counts[r] = _count(row, bounds[r])

    return propose


def _make_count(number):
    @Loop
    def count(p):
        """Count what reaches its bound: [sets, width] for as many rows each, or [rows] for whole rows."""
        rows, width, sets, pre, bounds, counts = carray(p, 6)
        pre = carray(_pointer(pre), (rows, width), number)
        by_column = carray(_pointer(bounds), (sets, width), number)
        by_row = carray(_pointer(bounds), rows, number)
        counts = carray(_pointer(counts), rows, np.int64)
        for r in _part(rows):
            counts[r] = _count(pre[r], by_column[r * sets // rows]) if sets else _count(pre[r], by_row[r])

    return count


def _make_gather(number):
    @Loop
    def gather(p):
        """Write the features that reach their bound, and their values unless there is room for none."""
        rows, width, sets, room, pre, bounds, ends, features, values = carray(p, 9)
        pre = carray(_pointer(pre), (rows, width), number)
        by_column = carray(_pointer(bounds), (sets, width), number)
        by_row = carray(_pointer(bounds), rows, number)
        ends = carray(_pointer(ends), rows + 1, np.int64)
        features = carray(_pointer(features), ends[rows], np.int64)
        values = carray(_pointer(values), room, number)
        for r in _part(rows):
            if sets:
                _gather(pre[r], by_column[r * sets // rows], ends[r], features, values)
            else:
                _gather(pre[r], by_row[r], ends[r], features, values)

    return gather


def _make_among(number):
    @Loop
    def among(p):
        """Write a number for the k largest of each row, else 0; ties at the last place all share, or the first do."""
        rows, width, k, share, one, pre, mask = carray(p, 7)
        pre = carray(_pointer(pre), (rows, width), number)
        mask = carray(_pointer(mask), (rows, width), number)
        keys = _room(width, number)
        for r in _part(rows):
            row, out = pre[r], mask[r]
            for j in range(len(row)):
                keys[j] = _key(row[j])
            bound = _bound(keys, k, k, number(-np.iinfo(number).max))
            for j in range(len(out)):
                out[j] = number(one) if keys[j] >= bound else number(0)
            spare = 0 if share else _reaching(keys, bound) - k
            for j in range(width - 1, -1, -1):
                if spare <= 0:
                    break
                if keys[j] == bound:
                    out[j] = number(0)
                    spare -= 1

    return among


class Loops:
    """The loops over floats of one width.

    Each takes sizes, then contiguous arrays: `pre` [rows, width] and whatever is compared or copied as integers of that
    width; features, counts and `ends` [rows + 1], where each row's codes start, as int64.

    Parameters
    ----------
    number
        The integers.
    """

    def __init__(self, number):
        self.propose, self.count, self.gather, self.among = (
            make(number) for make in (_make_propose, _make_count, _make_gather, _make_among)
        )
        for loop in (self.propose, self.count, self.gather, self.among):
            # numba keeps what has one name in one list, which two processes could mix up
            loop.body.__qualname__ += f"_{number.__name__}"
        self.infinity = INFINITY[np.iinfo(number).bits]

    def least(self, lowest: float) -> int:
        """Return the smallest key of a number that exceeds `lowest`, which is 0 or -inf."""
        return 1 if lowest == 0 else 1 - self.infinity


@Loop
def best(p):
    """Write the k largest codes of each row that reach the key `least` as [rows, k], and how many each row has."""
    rows, k, least, ends, bits, features, kept_bits, kept, counts = carray(p, 9)
    ends = carray(_pointer(ends), rows + 1, np.int64)
    bits = carray(_pointer(bits), ends[rows], np.int32)
    features = carray(_pointer(features), ends[rows], np.int64)
    kept_bits = carray(_pointer(kept_bits), (rows, k), np.int32)
    kept = carray(_pointer(kept), (rows, k), np.int64)
    counts = carray(_pointer(counts), rows, np.int64)
    longest = 0
    for r in _part(rows):
        longest = max(longest, ends[r + 1] - ends[r])
    keys = _room(longest, np.int32)
    for r in _part(rows):
        first, n = ends[r], ends[r + 1] - ends[r]
        for i in range(n):
            keys[i] = _key(bits[first + i])
        inside = keys[: -(-n // LANES) * LANES]
        inside[n:] = keys.dtype.type(np.iinfo(np.int32).min)
        bound = _bound(inside, k, k, np.int32(least))
        free, place = k, 0
        for i in range(n):
            free -= keys[i] > bound
        for i in range(n):
            tied = keys[i] == bound
            if keys[i] > bound or (tied and free > 0):
                free -= tied
                kept_bits[r, place] = bits[first + i]
                kept[r, place] = features[first + i]
                place += 1
        counts[r] = place


LOOPS = {2: Loops(np.int16), 4: Loops(np.int32)}
"""By the bytes of a float."""
