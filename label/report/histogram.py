"""The histogram of a feature's activation, split by its concept; silent rows stand apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import svg
from .html import Markup, el, join
from .numbers import count, share, short
from .strips import Axis, bar

WIDTH, HEIGHT = 570, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 26, 42
PARTS = (("n_false", "false", "concept does not hold"), ("n_true", "true", "concept holds"))


def histogram(bins: Sequence[dict[str, Any]], threshold: float | None) -> Markup:
    """Return the positive activations by size, counts on a logarithmic axis.

    Parameters
    ----------
    bins
        Rows of histograms.parquet of one feature; the bin from 0 to 0 is left out here.
    threshold
        The feature counts as firing strictly above; None draws no line.
    """
    positive = [b for b in bins if b["high"] > 0]
    if not positive:
        return el("p", {"class": "none"}, "It is silent on every held-out row.")
    names = ("n_true", "n_false", "n_unknown")
    top = max(max(b[n] for n in names) for b in positive)
    x = svg.Scale(0.0, positive[-1]["high"], LEFT, WIDTH - RIGHT)
    y = svg.Scale(math.log10(0.7), math.log10(max(top, 10) * 1.4), HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y)]
    for name, kind, _ in PARTS:
        parts.append(el("path", {"d": _steps(positive, name, x, y) + "Z", "class": f"area a-{kind}"}))
    if any(b["n_unknown"] for b in positive):
        parts.append(el("path", {"d": _steps(positive, "n_unknown", x, y), "class": "a-unknown"}))
    if threshold is not None:
        parts.append(_threshold(x(threshold), threshold))
    for b in positive:
        tip = (
            f"{short(b['low'])} to {short(b['high'])}: holds on {count(b['n_true'])}, does not on "
            f"{count(b['n_false'])}, unknown on {count(b['n_unknown'])} rows"
        )
        parts.append(
            svg.box(x(b["low"]), TOP, x(b["high"]) - x(b["low"]), HEIGHT - BOTTOM - TOP, "slot", tip)
        )
    legend = [("swatch s-true", "concept holds"), ("swatch s-false", "does not hold")]
    if any(b["n_unknown"] for b in bins):
        legend.append(("swatch s-unknown", "not applicable"))
    items = [el("li", None, el("span", {"class": kind}), " ", name) for kind, name in legend]
    label = "Histogram of positive activations, rows on a logarithmic axis, by whether the concept holds"
    return join([el("ul", {"class": "key"}, *items), svg.chart(WIDTH, HEIGHT, label, *parts)])


def silent(bins: Sequence[dict[str, Any]]) -> Markup:
    """Return, by the state of the concept, on which share of rows the feature is silent."""
    zero = next((b for b in bins if b["high"] == 0), None)
    axis = Axis(0.0, 1.0, 180)
    rows = []
    for name, kind, title in (*reversed(PARTS), ("n_unknown", "unknown", "concept not applicable")):
        total = sum(b[name] for b in bins)
        if not total:
            continue
        quiet = 0 if zero is None else zero[name]
        cells = [
            el("th", {"scope": "row"}, title),
            el("td", None, bar(axis, quiet / total, f"b-{kind}")),
            el("td", {"class": "n"}, share(quiet / total)),
            el("td", {"class": "n muted"}, f"{count(quiet)} of {count(total)} rows"),
        ]
        rows.append(el("tr", None, *cells))
    return el("table", {"class": "plain"}, el("caption", None, "Silent (activation zero)"), *rows)


def _axes(x: svg.Scale, y: svg.Scale) -> Markup:
    floor = y(y.low)
    parts = [svg.line(x.start, floor, x.end, floor, "axis")]
    for power in range(int(y.high) + 1):
        at = y(float(power))
        parts += [svg.line(x.start, at, x.end, at, "grid")]
        parts += [svg.words(x.start - 8, at + 4, f"{10**power:,}", anchor="end", kind="tick")]
    for value in svg.ticks(x.low, x.high, 6):
        parts += [svg.line(x(value), floor, x(value), floor + 4, "axis")]
        parts += [svg.words(x(value), floor + 17, short(value), anchor="middle", kind="tick")]
    parts.append(svg.words((x.start + x.end) / 2, HEIGHT - 6, "activation", anchor="middle", kind="name"))
    parts.append(svg.words(x.start, 12, "rows (log)", anchor="end", kind="name"))
    return join(parts)


def _steps(bins: Sequence[dict[str, Any]], name: str, x: svg.Scale, y: svg.Scale) -> str:
    floor = y(y.low)
    points = [(x(bins[0]["low"]), floor)]
    for b in bins:
        at = y(math.log10(b[name])) if b[name] else floor
        points += [(x(b["low"]), at), (x(b["high"]), at)]
    return svg.outline([*points, (x(bins[-1]["high"]), floor)])


def _threshold(x: float, value: float) -> Markup:
    late = x > WIDTH * 0.7
    return join(
        [
            svg.line(x, 16, x, HEIGHT - BOTTOM, "threshold"),
            svg.words(
                x + (-6 if late else 6),
                18,
                f"fires above {short(value)}",
                anchor="end" if late else "start",
                kind="strong",
            ),
        ]
    )
