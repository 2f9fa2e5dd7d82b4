"""How figures are written: one way for each kind, with a dash for what is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NONE = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def known(value: object) -> bool:
    """Return whether a value is there: neither null nor NaN."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def fixed(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed decimals: '0.62'."""
    if value is None or not known(value):
        return NONE
    shown = f"{value:.{digits}f}"
    return f"{_MINUS}{shown[1:]}" if shown.startswith("-") and float(shown) else shown.removeprefix("-")


def signed(value: float | None, digits: int = 2) -> str:
    """Return a number with its sign: '+0.12'."""
    shown = fixed(value, digits)
    return f"+{shown}" if value is not None and known(value) and float(f"{value:.{digits}f}") > 0 else shown


def short(value: float | None) -> str:
    """Return a number of any size with three significant digits: '1,240', '0.0312', '12.4k', '3.1e-07'."""
    if value is None or not known(value):
        return NONE
    size = abs(value)
    if size >= 1e4:
        # what rounds to a million is one
        size = float(f"{size:.3g}")
    if size and (size < 1e-3 or size >= 1e9):
        shown = f"{value:.2g}"
    elif size >= 1e6:
        shown = f"{value / 1e6:.3g}M"
    elif size >= 1e4:
        shown = f"{value / 1e3:.3g}k"
    elif size >= 100 or value == int(value):
        # a negative zero is zero
        shown = f"{value + 0.0:,.0f}"
    else:
        shown = f"{value:.3g}"
    return shown.replace("-", _MINUS, 1) if shown.startswith("-") else shown


def share(value: float | None) -> str:
    """Return a share in per cent: '2.3%', '<0.01%'; only all of it is '100%'."""
    if value is None or not known(value):
        return NONE
    percent = 100 * value
    if 0 < percent < 0.01:
        return "<0.01%"
    if 99.95 <= percent < 100:
        return ">99.9%"
    return f"{percent:.0f}%" if percent in (0, 100) else f"{percent:.{1 if percent >= 1 else 2}f}%"


def count(value: int | None) -> str:
    """Return a whole number with separators."""
    return NONE if value is None else f"{value:,}"


def p_text(value: float | None) -> str:
    """Return a p- or q-value: '0.003', '<0.001'."""
    if value is None or not known(value):
        return NONE
    return "<0.001" if value < 1e-3 else f"{value:.3f}"


def bracket(record: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """Return the interval of a measured figure: '[0.55, 0.70]', or nothing where there is none."""
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    return f"[{fixed(low, digits)}, {fixed(high, digits)}]" if known(low) and known(high) else ""


def span(record: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """Return a measured figure with its interval: '0.62 [0.55, 0.70]'."""
    return f"{fixed(record.get(name), digits)} {bracket(record, name, digits)}".rstrip()


def period(time: int, unit: str) -> str:
    """Return a period index as people write it: '2015-03' where it counts calendar months, else the index."""
    if unit == "month" and 1900 * 12 <= time < 2100 * 12:
        return f"{time // 12:04d}-{time % 12 + 1:02d}"
    return str(time)
