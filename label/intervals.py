"""How the ends of an interval of values are written."""

from __future__ import annotations

import math

_ROOM = 0.01
"""Of an interval's width, that a written end may be off."""
_ONE_SIDED = 6
"""Significant digits of an end that has no width to be held against."""


def written_ends(low: float | None, high: float | None, *, least: int = 3) -> tuple[str, str]:
    """Return both ends of an interval as text, with no more digits than tell it from others; nothing for None.

    A written end is off by at most a hundredth of the interval's width, so that the two stay apart; the end of an
    interval that is open on the other side has six significant digits. Below 1e9 nothing is rounded left of the point.

    Parameters
    ----------
    low, high
        The ends, low <= high; None = open.
    least
        Significant digits that an end has at least, but for zeros at its end.

    Examples
    --------
    >>> written_ends(0.55, 0.7)
    ('0.55', '0.7')
    >>> written_ends(1001.2, 1004.9)
    ('1001.2', '1004.9')
    >>> written_ends(1000.07, None)
    ('1000.07', '')
    """
    room = _ROOM * (high - low) if low is not None and high is not None else 0.0
    return _written(low, room, least), _written(high, room, least)


def _written(end: float | None, room: float, least: int) -> str:
    if end is None:
        return ""
    if not 0 < room < math.inf:
        return _digits(end, max(least, _ONE_SIDED))
    # seventeen digits tell any double from all others
    texts = (_digits(end, n) for n in range(least, 18))
    return next(text for text in texts if abs(float(text) - end) <= room)


def _digits(value: float, n: int) -> str:
    """Return a value with n significant digits, or those left of its point, where these are more."""
    whole = len(f"{abs(value):.0f}") if abs(value) < 1e9 else 0
    # the sum is never the negative zero
    return f"{value + 0.0:.{max(n, whole)}g}"
