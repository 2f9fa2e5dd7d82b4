"""Whether a label says more than a raw column and the untrained twin do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .baselines import ColumnDetector, TwinFeature
from .confirm import Measure
from .statistics.bootstrap import Interval, interval


@dataclass(frozen=True)
class Compared:
    """A target's worth without the model: raw column and twin, as confirm measured them."""

    column: ColumnDetector | None
    column_measure: Measure | None
    twins: list[tuple[TwinFeature, Measure]]
    """On the target itself, then on a range of the twin's own; none without a twin."""


class Learned(NamedTuple):
    """Whether a label exceeds raw column and twin, and the paired differences of skill."""

    verdict: bool | None
    """None where either is missing."""
    over_raw: Interval | None
    over_twin: Interval | None
    """Over the twin's feature that the label exceeds least surely."""
    twin: tuple[TwinFeature, Measure] | None
    """That feature."""


def learned(label: Measure, compared: Compared) -> Learned:
    """Hold a label against what its target is worth without the model."""
    over_raw = over_twin = twin = verdict = None
    if compared.column_measure is not None:
        over_raw = _over(label, compared.column_measure)
    if compared.twins:
        over = [_over(label, measure) for _, measure in compared.twins]
        least = min(range(len(over)), key=lambda i: over[i].low)
        over_twin, twin = over[least], compared.twins[least]
    if over_raw is not None and over_twin is not None:
        verdict = over_raw.low > 0 and over_twin.low > 0
    return Learned(verdict, over_raw, over_twin, twin)


def _over(mine: Measure, other: Measure) -> Interval:
    return interval(mine.skill.value - other.skill.value, mine.skill_draws - other.skill_draws)
