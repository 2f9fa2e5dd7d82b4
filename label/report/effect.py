"""What removing a feature does to the model's default logit, entity by entity, beside its controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import svg
from .html import Child, Markup, el
from .numbers import bracket, count, fixed, known, share, short, signed
from .page import facts
from .strips import Axis, Point, head, strip

WIDTH, HEIGHT = 570, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 62, 42
N_BINS = 41


def changes(record: dict[str, Any], values: Sequence[float]) -> Markup:
    """Return the histogram of the change of the logit per entity, with its mean and interval above."""
    reach = max(*map(abs, values), 1e-9) * 1.02
    counts, edges = np.histogram(np.asarray(values), bins=N_BINS, range=(-reach, reach))
    x = svg.Scale(-reach, reach, LEFT, WIDTH - RIGHT)
    y = svg.Scale(0.0, float(counts.max()), HEIGHT - BOTTOM, TOP)
    floor = HEIGHT - BOTTOM
    parts = [svg.line(LEFT, floor, WIDTH - RIGHT, floor, "axis")]
    for tick in svg.ticks(0.0, float(counts.max()), 3):
        parts += [svg.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")]
        parts += [svg.words(LEFT - 8, y(tick) + 4, short(tick), anchor="end", kind="tick")]
    for n, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        tip = f"{short(low)} to {short(high)}: {n} entities"
        parts.append(svg.box(x(low) + 0.5, y(n), x(high) - x(low) - 1, floor - y(n), "b-effect", tip))
    for tick in svg.ticks(-reach, reach, 6):
        parts += [svg.words(x(tick), floor + 17, short(tick), anchor="middle", kind="tick")]
    parts.append(svg.line(x(0), TOP - 6, x(0), floor, "zero"))
    bar = TOP - 16
    if known(record["effect_low"]) and known(record["effect_high"]):
        parts.append(svg.whisker(x(record["effect_low"]), x(record["effect_high"]), bar, "m-main whisker"))
    if known(record["effect"]):
        right = known(record["effect_high"]) and x(record["effect_high"]) < WIDTH * 0.6
        at = (
            x(record["effect_high"]) + 9
            if right
            else x(record["effect"] if record["effect_low"] is None else record["effect_low"]) - 9
        )
        parts.append(svg.mark(x(record["effect"]), bar, "circle", "m-main"))
        parts.append(
            svg.words(
                at,
                bar + 4,
                f"mean {signed(record['effect'], 3)}",
                anchor="start" if right else "end",
                kind="strong",
            )
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts += [
        svg.words(LEFT, 14, "← without it the PD is lower", kind="name"),
        svg.words(WIDTH - RIGHT, 14, "without it the PD is higher →", anchor="end", kind="name"),
        svg.words(
            middle, HEIGHT - 6, "change of the default logit when removed", anchor="middle", kind="name"
        ),
        svg.words(LEFT - 8, TOP - 12, "entities", anchor="end", kind="name"),
    ]
    return svg.chart(WIDTH, HEIGHT, f"Change of the default logit over {len(values)} entities", *parts)


def sizes(record: dict[str, Any]) -> Markup:
    """Return the mean absolute change beside that of random directions and of matched features."""
    mine = (record[n] for n in ("effect_size", "effect_size_low", "effect_size_high"))
    rows = [
        ("this feature", Point(*mine)),
        (
            "random directions",
            Point(record["random_size"], shape="square", kind="m-raw", name="random directions"),
        ),
        (
            "matched features",
            Point(record["matched_size"], shape="triangle", kind="m-twin", name="matched features"),
        ),
    ]
    axis = Axis.around([v for _, p in rows for v in (p.value, p.high)], 260)
    body = [
        el(
            "tr",
            None,
            el("th", {"scope": "row"}, name),
            el("td", None, strip(axis, [point])),
            el("td", {"class": "n"}, fixed(point.value, 3)),
        )
        for name, point in rows
    ]
    top = el(
        "tr",
        None,
        el("th"),
        el("th", {"scope": "col"}, head(axis, "mean |change of logit|")),
        el("th", {"class": "n"}),
    )
    return el("table", {"class": "plain"}, el("thead", None, top), el("tbody", None, *body))


def differences(record: dict[str, Any]) -> Markup:
    """Return by how much it exceeds its controls."""
    items: list[tuple[Child, Child]] = [
        (title, f"{signed(record[name], 3)} {bracket(record, name, 3)}".rstrip())
        for name, title in (
            ("over_random", "Above the largest of the random directions"),
            ("over_matched", "Above the matched features"),
        )
    ]
    items.append(("Share of what removing all features moves", share(record["effect_share"])))
    items.append(("Entities", count(record["effect_entities"])))
    return facts(items, "facts")
