"""Small plots that stand in the cells of a table and share its axis: intervals and bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import svg
from .html import Markup, el, join
from .numbers import fixed, known, short

HEIGHT = 24
MARGIN = 7.0


class Point(NamedTuple):
    """One figure on a strip."""

    value: float | None
    low: float | None = None
    high: float | None = None
    shape: svg.Shape = "circle"
    kind: str = "m-main"
    name: str = ""

    @property
    def tip(self) -> str:
        """What hovering says."""
        ends = f" [{fixed(self.low)}, {fixed(self.high)}]" if known(self.low) and known(self.high) else ""
        return f"{self.name}: {short(self.value)}{ends}" if self.name else f"{short(self.value)}{ends}"


class Axis(NamedTuple):
    """The axis that the strips of one column share."""

    low: float
    high: float
    width: int

    @staticmethod
    def around(
        values: Iterable[float | None], width: int, *, low: float = 0.0, high: float | None = None
    ) -> Axis:
        """Return an axis that holds the given ends and all values, on round numbers."""
        there = [v for v in values if v is not None and known(v)]
        bottom, top = min([low, *there]), max([low if high is None else high, *there])
        if not top > bottom:
            top = bottom + 1.0
        step = 10.0 ** math.floor(math.log10((top - bottom) / 2))
        return Axis(math.floor(bottom / step + 1e-9) * step, math.ceil(top / step - 1e-9) * step, width)

    @property
    def scale(self) -> svg.Scale:
        """From values to pixels."""
        return svg.Scale(self.low, self.high, MARGIN, self.width - MARGIN)

    @property
    def ticks(self) -> list[float]:
        """Round values on it."""
        return svg.ticks(self.low, self.high, max(2, self.width // 60))


def head(axis: Axis, label: str) -> Markup:
    """Return the axis for the head of the table's column."""
    numbers = [svg.words(axis.scale(t), 11, short(t), anchor="middle", kind="tick") for t in axis.ticks]
    return join([label, el("br"), svg.chart(axis.width, 14, f"axis of {label}", *numbers)])


def strip(axis: Axis, points: Sequence[Point]) -> Markup:
    """Return figures with their intervals on one line."""
    scale, middle = axis.scale, HEIGHT / 2
    parts = _grid(axis)
    shown = [p for p in points if known(p.value)]
    for p in shown:
        if p.low is not None and p.high is not None and known(p.low) and known(p.high):
            parts.append(svg.whisker(scale(p.low), scale(p.high), middle, f"{p.kind} whisker"))
    # the first point is the one that matters: it is drawn last, on top
    for p in reversed(shown):
        assert p.value is not None
        parts.append(svg.mark(scale(p.value), middle, p.shape, p.kind, p.tip))
    return svg.chart(axis.width, HEIGHT, "; ".join(p.tip for p in shown) or "no figure", *parts)


def bar(axis: Axis, value: float, kind: str = "b-main") -> Markup:
    """Return a bar from zero."""
    scale = axis.scale
    zero, end = scale(0.0), scale(value)
    body = svg.box(min(zero, end), 5, abs(end - zero), HEIGHT - 10, kind, short(value))
    return svg.chart(axis.width, HEIGHT, short(value), *_grid(axis), body)


def key(points: Sequence[Point]) -> Markup:
    """Return the legend of a column of strips."""
    items = [
        el(
            "li",
            None,
            el(
                "svg",
                {"width": 16, "height": 14, "aria-hidden": "true"},
                svg.mark(8, 7, p.shape, p.kind),
            ),
            " ",
            p.name,
        )
        for p in points
    ]
    return el("ul", {"class": "key"}, *items)


def _grid(axis: Axis) -> list[Markup]:
    return [
        svg.line(axis.scale(t), 0, axis.scale(t), HEIGHT, "zero" if t == 0 else "grid") for t in axis.ticks
    ]
