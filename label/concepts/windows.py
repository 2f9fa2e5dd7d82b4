"""Named windows: which periods of an entity's history an expression may gather, and the SQL that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from sae.config import Config


@dataclass(frozen=True)
class Frame:
    """The periods from `first` to `last` relative to now; None = from the entity's first record.

    Frames count periods, not rows: in a panel with gaps, six months stay six months.
    """

    first: int | None
    last: int

    @property
    def history(self) -> int:
        """Periods of history, now included, at which the frame is full; 1 from the start."""
        return 1 if self.first is None else max(1, 1 - self.first)

    @property
    def ahead(self) -> int:
        """Periods that the frame reaches past now."""
        return max(0, self.last)

    @property
    def sql(self) -> str:
        """The window definition over the columns `entity` and `time`."""
        order = "PARTITION BY entity ORDER BY time"
        return f"({order} RANGE BETWEEN {_bound(self.first)} AND {_bound(self.last)})"


def _bound(offset: int | None) -> str:
    if offset is None:
        return "UNBOUNDED PRECEDING"
    if offset == 0:
        return "CURRENT ROW"
    return f"{abs(offset)} {'PRECEDING' if offset < 0 else 'FOLLOWING'}"


class Window(Config):
    """A window as a concept file declares it; it never reaches past now."""

    months: int | None = Field(default=None, ge=1, le=600)
    """Its length in periods."""
    before: int = Field(default=0, ge=0, le=600)
    """How many periods before now it ends; 0 = it includes now."""
    start: Literal["start"] | None = Field(default=None, alias="from")
    """`from: start` in place of `months`: everything since the entity's first record."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.months is None) == (self.start is None):
            raise ValueError("give either `months` or `from: start`")
        return self

    @property
    def frame(self) -> Frame:
        """The periods relative to now."""
        return Frame(None if self.months is None else 1 - self.months - self.before, -self.before)


STANDARD = {
    "w": Frame(None, 0),
    "w2": Frame(-1, 0),
    "w3": Frame(-2, 0),
    "w6": Frame(-5, 0),
    "w12": Frame(-11, 0),
    "w3p": Frame(-3, -1),
    "w6p": Frame(-6, -1),
    "wq": Frame(-5, -3),
    "w3l": Frame(-3, -1),
    "w12p2": Frame(-13, -2),
    "wc": Frame(None, 0),
    "wp": Frame(None, -1),
}
"""Always available: `w` the history, for lag and row_number; `wN` the last N periods; `wNp` the N before now;
`wq` t-5..t-3; `w3l` t-3..t-1; `w12p2` t-13..t-2; `wc` start..now; `wp` start..t-1."""

AHEAD = {"n3": Frame(1, 3), "n6": Frame(1, 6), "n12": Frame(1, 12)}
"""The next N periods, for `kind: outcome` only."""


def generated(lags: frozenset[int], leads: frozenset[int]) -> dict[str, Frame]:
    """Return the one-period windows that `lag` and `lead` are written on."""
    return {f"lag_{n}": Frame(-n, -n) for n in lags} | {f"lead_{n}": Frame(n, n) for n in leads}
