"""One entity's history: activation per period above the raw columns it is computed from, gaps included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from . import svg
from .html import Markup, el, join
from .numbers import short

Record = dict[str, Any]
LABELS, PLOT, VALUES = 94, 222, 60
LETTERS = 13
"""Of a column's name that fit beside its plot."""
WIDTH = LABELS + PLOT + VALUES
ACTIVATION, RIBBON, COLUMN, SPACE = 58, 8, 28, 8
STATES = {
    True: ("r-true", "concept holds"),
    False: ("r-false", "does not hold"),
    None: ("r-none", "not applicable"),
}


class Frame(NamedTuple):
    """What all timelines of a page share, so that they can be compared."""

    max_activation: float
    threshold: float
    ranges: Mapping[str, tuple[float, float]]
    """Per raw column the range it is drawn in; a column that is not there has its own in each history."""
    times: tuple[int, int] | None
    """The periods drawn; None: each history's own."""
    show_time: Callable[[int], str]


def frame_of(
    histories: Sequence[Sequence[Record]], threshold: float, show_time: Callable[[int], str]
) -> Frame:
    """Return the frame for the histories of a page.

    A column has one range where histories are comparable in it (pooled range at most five times the median
    one); calendar time is shared where that does not squeeze the histories.
    """
    rows = [row for history in histories for row in history]
    columns = [name for name in (rows[0] if rows else {}) if name.startswith("raw_")]
    ranges = {}
    for name in columns:
        spans = [s for s in (_range(history, name) for history in histories) if s is not None]
        if not spans:
            continue
        low, high = min(s[0] for s in spans), max(s[1] for s in spans)
        widths = sorted(s[1] - s[0] for s in spans if s[1] > s[0])
        if not widths or high - low <= 5 * widths[len(widths) // 2]:
            ranges[name] = (low, high)
    times = [row["time"] for row in rows]
    longest = max((h[-1]["time"] - h[0]["time"] for h in histories if h), default=0)
    shared = bool(times) and max(times) - min(times) <= 1.5 * longest + 6
    return Frame(
        max((row["activation"] for row in rows), default=0.0),
        threshold,
        ranges,
        (min(times), max(times)) if shared else None,
        show_time,
    )


def columns_by_contrast(histories: Sequence[Sequence[Record]], threshold: float) -> list[str]:
    """Return the raw columns, those first whose standardised mean differs most where the feature fires."""
    rows = [row for history in histories for row in history]
    names = [name for name in (rows[0] if rows else {}) if name.startswith("raw_")]

    def contrast(name: str) -> float:
        firing = [r[name] for r in rows if r[name] is not None and r["activation"] > threshold]
        others = [r[name] for r in rows if r[name] is not None and r["activation"] <= threshold]
        if not firing or not others:
            return 0.0
        everything = firing + others
        mean = sum(everything) / len(everything)
        spread = (sum((v - mean) ** 2 for v in everything) / len(everything)) ** 0.5
        return abs(sum(firing) / len(firing) - sum(others) / len(others)) / spread if spread else 0.0

    return sorted((n for n in names if any(r[n] is not None for r in rows)), key=lambda n: -contrast(n))


def timeline(
    history: Sequence[Record], columns: Sequence[str], frame: Frame, *, name: str, lead: bool
) -> Markup:
    """Return one history as a picture.

    Parameters
    ----------
    history
        Rows of examples.parquet of one entity, in time.
    columns
        Raw columns to draw, from above.
    frame
        What is shared with other histories.
    name
        What the picture is of, for screen readers.
    lead
        Whether activation and concept stand above the columns.
    """
    first, last = frame.times or (history[0]["time"], history[-1]["time"])
    step = PLOT / (last - first + 1)

    def x(time: int) -> float:
        return LABELS + (time - first) * step

    parts: list[Markup] = []
    y = 6.0
    if lead:
        parts.append(_activation(history, frame, x, step, y))
        y += ACTIVATION + 5
        parts.append(_ribbon(history, x, step, y))
        y += RIBBON + SPACE
    for column in columns:
        parts.append(_column(history, column, frame, x, step, y))
        y += COLUMN + SPACE
    floor = y - SPACE + 2
    holes = [(a["time"] + 1, b["time"] - 1) for a, b in pairwise(history) if b["time"] - a["time"] > 1]
    gaps = [
        svg.box(x(a), 4, (b - a + 1) * step, floor - 4, tip=f"{_from_to(a, b, frame)}: no row")
        for a, b in holes
    ]
    slots = [svg.box(x(r["time"]), 4, step, floor - 4, tip=_tip(r, columns, frame)) for r in history]
    axis = [
        svg.words(LABELS, floor + 13, frame.show_time(first), kind="tick"),
        svg.words(LABELS + PLOT, floor + 13, frame.show_time(last), anchor="end", kind="tick"),
    ]
    return svg.chart(WIDTH, floor + 18, name, svg.group("gap", gaps), *parts, *axis, svg.group("slot", slots))


Place = Callable[[int], float]


def _activation(history: Sequence[Record], frame: Frame, x: Place, step: float, top: float) -> Markup:
    y = svg.Scale(0.0, frame.max_activation or 1.0, top + ACTIVATION, top)
    gap = min(1.0, step * 0.15)
    parts = [svg.words(LABELS - 8, top + ACTIVATION / 2 + 4, "activation", anchor="end", kind="row strong")]
    for kind, fires in (("b-fire", True), ("b-weak", False)):
        rows = [r for r in history if r["activation"] > 0 and (r["activation"] > frame.threshold) == fires]
        tops = [(x(r["time"]) + gap / 2, y(r["activation"])) for r in rows]
        parts.append(svg.group(kind, (svg.box(left, at, step - gap, y(0) - at) for left, at in tops)))
    parts.append(svg.line(LABELS, y(0), LABELS + PLOT, y(0), "axis"))
    level = y(frame.threshold)
    parts.append(svg.line(LABELS, level, LABELS + PLOT, level, "threshold thin"))
    right = LABELS + PLOT + 5
    parts.append(svg.words(right, top + 8, short(frame.max_activation), kind="end"))
    if level - top > 14 and y(0) - level > 10:
        parts.append(svg.words(right, level + 3, f"▸ {short(frame.threshold)}", kind="end"))
    parts.append(svg.words(right, y(0), "0", kind="end"))
    return join(parts)


def _ribbon(history: Sequence[Record], x: Place, step: float, top: float) -> Markup:
    parts = [svg.words(LABELS - 8, top + RIBBON, "concept", anchor="end", kind="row")]
    for state, (kind, _) in STATES.items():
        times = [row["time"] for row in history if row["concept_true"] is state]
        parts.append(
            svg.group(kind, (svg.box(x(a), top, (b - a) * step, RIBBON) for a, b in _stretches(times)))
        )
    return join(parts)


def _stretches(times: Sequence[int]) -> list[tuple[int, int]]:
    """Return runs of consecutive periods as half-open pairs."""
    out: list[tuple[int, int]] = []
    for time in times:
        if out and out[-1][1] == time:
            out[-1] = (out[-1][0], time + 1)
        else:
            out.append((time, time + 1))
    return out


def _column(
    history: Sequence[Record], column: str, frame: Frame, x: Place, step: float, top: float
) -> Markup:
    title = column.removeprefix("raw_")
    shown = title if len(title) <= LETTERS else title[: LETTERS - 1] + "…"
    label = el(
        "text",
        {"x": LABELS - 8, "y": top + COLUMN / 2 + 4, "text-anchor": "end", "class": "row"},
        shown,
        el("title", None, title),
    )
    mine = _range(history, column)
    if mine is None:
        none = svg.words(LABELS + 4, top + COLUMN / 2 + 4, "no value", kind="tick")
        return join([label, none])
    low, high = frame.ranges.get(column, mine)
    y = svg.Scale(low, high, top + COLUMN - 3, top + 3)
    points = [(r["time"], r[column]) for r in history if r[column] is not None]
    runs: list[list[tuple[float, float]]] = [[]]
    for i, (time, value) in enumerate(points):
        if i and time - points[i - 1][0] > 1:
            runs.append([])
        runs[-1].append((x(time) + step / 2, y(value)))
    parts = [label, svg.line(LABELS, top + COLUMN, LABELS + PLOT, top + COLUMN, "grid")]
    # h0 gives a value between two gaps a stroke of no length, which its round ends show
    lines = "".join(svg.outline(run) + ("h0" if len(run) == 1 else "") for run in runs)
    parts.append(el("path", {"d": lines, "class": "series dotted" if step > 6 else "series"}))
    right = LABELS + PLOT + 5
    own = "" if column in frame.ranges else " *"
    parts.append(svg.words(right, top + 8, short(high) + own, kind="end"))
    if high > low:
        parts.append(svg.words(right, top + COLUMN, short(low), kind="end"))
    return join(parts)


def _range(history: Sequence[Record], column: str) -> tuple[float, float] | None:
    values = [row[column] for row in history if row[column] is not None]
    return (min(values), max(values)) if values else None


def _tip(row: Record, columns: Sequence[str], frame: Frame) -> str:
    when, state = frame.show_time(row["time"]), STATES[row["concept_true"]][1]
    head = f"{when}: activation {short(row['activation'])}, {state}"
    return "\n".join([head, *(f"{c.removeprefix('raw_')} {short(row[c])}" for c in columns)])


def _from_to(first: int, last: int, frame: Frame) -> str:
    return " to ".join(frame.show_time(t) for t in dict.fromkeys((first, last)))


def has_gap(history: Sequence[Record]) -> bool:
    """Return whether periods are missing between the rows of a history."""
    return any(b["time"] - a["time"] > 1 for a, b in pairwise(history))
