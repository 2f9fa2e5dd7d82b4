"""Pieces that every plot is made of: scales, ticks, gridlines, marks, whiskers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from .html import Child, Markup, coordinate, el, join

Shape = Literal["circle", "square", "triangle", "diamond"]


class Scale(NamedTuple):
    """A linear map from values to pixels; what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        width = self.high - self.low
        part = (value - self.low) / width if width else 0.5
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)


def ticks(low: float, high: float, n: int) -> list[float]:
    """Return about `n` round values from low to high.

    Examples
    --------
    >>> ticks(0, 1, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(n, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart(width: float, height: float, label: str, *children: Child) -> Markup:
    """Return a picture in pixels of its own, with what a screen reader says of it."""
    size = {"width": width, "height": height, "viewBox": f"0 0 {width:g} {height:g}"}
    return el("svg", {"role": "img", "aria-label": label, **size}, *children)


def words(x: float, y: float, content: Child, *, anchor: str = "start", kind: str = "") -> Markup:
    """Return text at a point."""
    return el("text", {"x": x, "y": y, "text-anchor": anchor, "class": kind or None}, content)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """Return a line."""
    return el("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": kind})


def group(kind: str, children: Iterable[Child]) -> Markup:
    """Return shapes of one class; it is written once, which keeps pages with many shapes small."""
    return el("g", {"class": kind}, *children)


def box(
    x: float, y: float, width: float, height: float, kind: str | None = None, tip: Child = None
) -> Markup:
    """Return a rectangle, with a tooltip where there is something to say."""
    shape = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0), "class": kind}
    return el("rect", shape, *([] if tip is None else [el("title", None, tip)]))


def mark(x: float, y: float, shape: Shape, kind: str, tip: Child = None, size: float = 4.5) -> Markup:
    """Return a symbol; shapes differ so that no one depends on colours."""
    inside = [] if tip is None else [el("title", None, tip)]
    if shape == "circle":
        return el("circle", {"cx": x, "cy": y, "r": size, "class": kind}, *inside)
    s = size
    corners = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": [(0, -s - 0.5), (s + 0.5, s), (-s - 0.5, s)],
        "diamond": [(0, -s - 1), (s + 1, 0), (0, s + 1), (-s - 1, 0)],
    }[shape]
    return el("path", {"d": outline([(x + a, y + b) for a, b in corners]) + "Z", "class": kind}, *inside)


def outline(points: Sequence[tuple[float, float]]) -> str:
    """Return the path through points."""
    return "".join(f"{'L' if i else 'M'}{coordinate(x)} {coordinate(y)}" for i, (x, y) in enumerate(points))


def whisker(low: float, high: float, y: float, kind: str) -> Markup:
    """Return an interval in pixels, with ends."""
    ends = [line(x, y - 3.5, x, y + 3.5, kind) for x in (low, high)]
    return join([line(low, y, high, y, kind), *ends])
