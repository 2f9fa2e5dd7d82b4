"""What a feature is called outside."""

from __future__ import annotations

from .intervals import written_ends

_DIGITS = 6
"""Of an interval's ends: names are kept by those who use the columns, so they hold these however few would do."""


def column_name(feature: int, d_sae: int, concept: str | None, low: float | None, high: float | None) -> str:
    """Return the name of a feature's column; it changes only if the feature's label does.

    Parameters
    ----------
    feature, d_sae
        Its number, and how many there are.
    concept
        The concept of its label; None where it has none.
    low, high
        The label's interval of values, low <= value < high; None = open.

    Examples
    --------
    >>> column_name(123, 1024, "util_high", 0.9, None)
    'f_0123__util_high_at_least_0.9'
    >>> column_name(7, 1024, None, None, None)
    'f_0007'
    """
    name = f"f_{feature:0{max(4, len(str(d_sae - 1)))}d}"
    if concept is None:
        return name
    first, last = written_ends(low, high, least=_DIGITS)
    if first and last:
        return f"{name}__{concept}_{first}_to_below_{last}"
    return f"{name}__{concept}" + (f"_at_least_{first}" if first else f"_below_{last}" if last else "")
