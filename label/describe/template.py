"""The description of a feature, from its confirmed record and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from label.decide import REASONS
from label.intervals import written_ends

VERDICTS = {True: "yes", False: "no", None: "not assessed"}


def interval_text(low: float | None, high: float | None, *, whole: bool) -> str:
    """Return an interval of values in words; `whole` = the concept takes whole numbers only.

    Examples
    --------
    >>> interval_text(0.55, 0.7, whole=False)
    'between 0.55 and 0.7'
    >>> interval_text(2, None, whole=True)
    '2 or more'
    >>> interval_text(12.4, 14.4, whole=True)
    '13 to 14'
    """
    if whole:
        # quantiles may lie between two of them
        first = None if low is None else math.ceil(low)
        last = None if high is None else math.ceil(high) - 1
        if first is not None and first == last:
            return f"exactly {first}"
        if first is None:
            return "" if last is None else f"{last} or less"
        return f"{first} or more" if last is None else f"{first} to {last}"
    start, end = written_ends(low, high)
    if not end:
        return f"at least {start}" if start else ""
    return f"between {start} and {end}" if start else f"below {end}"


def title(record: Mapping[str, Any]) -> str:
    """Return what a feature's concept says, with its interval: 'Credit utilisation between 0.55 and 0.7'."""
    span = interval_text(record["low"], record["high"], whole=bool(record["whole"]))
    return f"{record['concept_text']}: {span}" if span else str(record["concept_text"])


def describe(record: Mapping[str, Any]) -> str:
    """Return the description of a feature.

    Parameters
    ----------
    record
        A row of features.parquet, with `concept_text` and `whole` of its concept.
    """
    if record["status"] != "labelled":
        return f"unlabelled: {REASONS[record['reason']]}"
    parts = [
        f"Fires when: {title(record)}.",
        f"Skill {_span(record, 'skill')}, precision {_span(record, 'precision')}, recall {_span(record, 'recall')}, "
        f"F1 {_span(record, 'f1')}; the concept holds on {record['prevalence']:.2%} of rows, "
        f"in {record['n_entities']} entities.",
        _learned(record),
        _used(record),
    ]
    if record["rivals"]:
        parts.append(f"As good or better within the intervals: {', '.join(record['rivals'])}.")
    return " ".join(parts)


def _span(record: Mapping[str, Any], name: str) -> str:
    return f"{record[name]:.2f} [{record[f'{name}_low']:.2f}, {record[f'{name}_high']:.2f}]"


def _learned(record: Mapping[str, Any]) -> str:
    if record["learned"] is None:
        return "Whether it was learned was not assessed."
    column = f"the raw column ({record['raw_column']}, {record['raw_skill']:.2f})"
    twin = f"the untrained twin ({record['twin_skill']:.2f})"
    if record["learned"]:
        return f"Learned: its skill exceeds that of {column} and of {twin}."
    if not record["over_raw_low"] > 0:
        return f"Not learned: it restates {record['raw_column']} (skill {record['raw_skill']:.2f})."
    return f"Not learned: an untrained network does as well (skill {record['twin_skill']:.2f})."


def _used(record: Mapping[str, Any]) -> str:
    if record["used"] is None:
        return "Whether the model uses it was not assessed."
    way, value, low, high = "moves", record["effect"], record["effect_low"], record["effect_high"]
    if low * high > 0:
        way, value = "lowers" if value < 0 else "raises", abs(value)
        low, high = sorted((abs(low), abs(high)))
    size = f"{value:.3g} [{low:.3g}, {high:.3g}]"
    moved = (
        f"removing it {way} the default logit by {size} on average, {record['effect_share']:.1%} of what removing "
        f"all features moves"
    )
    if record["used"]:
        return f"Used: {moved}, more than random directions and matched features do."
    return f"Not used: {moved}, no more than random directions or matched features do."
