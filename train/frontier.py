"""What the dictionaries of a sweep came to: a table, and a drawing of FVU against L0."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import rich.markup
from rich.table import Table

from sae.strict_json import as_json

SWEEP = "sweep.json"
FORMAT_VERSION = 1
WIDTH, HEIGHT, MARGIN = 720, 440, 60


class Point(NamedTuple):
    """A dictionary on held-out rows.

    Attributes
    ----------
    name
        Its folder.
    fvu, l0, dead
        As `sae.metrics` defines them.
    seconds
        Time of its own training steps.
    """

    name: str
    fvu: float
    l0: float
    dead: float
    seconds: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both FVU and L0, by L0; what is not finite beats nothing."""
    best: list[Point] = []
    for point in sorted(_finite(points), key=lambda p: (p.l0, p.fvu)):
        if not best or point.fvu < best[-1].fvu:
            best.append(point)
    return best


def as_table(points: Sequence[Point], split: str) -> Table:
    """Return the dictionaries by L0; a star marks those on the frontier."""
    best = {point.name for point in frontier(points)}
    table = Table(title=f"Dictionaries from one read, on {split}", title_justify="left", box=None)
    table.add_column("")
    table.add_column("dictionary", overflow="fold")
    for name in ("FVU", "L0", "dead", "seconds"):
        table.add_column(name, justify="right")
    for p in sorted(points, key=lambda p: p.l0):
        star = "*" if p.name in best else ""
        table.add_row(
            star,
            rich.markup.escape(p.name),
            f"{p.fvu:.4f}",
            f"{p.l0:.1f}",
            f"{p.dead:.1%}",
            f"{p.seconds:,.1f}",
        )
    return table


def as_svg(points: Sequence[Point], split: str) -> str:
    """Return a drawing: a mark per dictionary that has finite figures, with its name, and a line through the frontier."""
    points = _finite(points)
    x = _axis([p.l0 for p in points], MARGIN, WIDTH - MARGIN)
    y = _axis([p.fvu for p in points], HEIGHT - MARGIN, MARGIN)
    line = " ".join(f"{x.place(p.l0):.1f},{y.place(p.fvu):.1f}" for p in frontier(points))
    bottom, left = HEIGHT - MARGIN, MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f"<title>FVU against L0 on {escape(split)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{left} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
        f'<polyline points="{line}" fill="none" stroke="#0b6" stroke-width="2"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 15}" text-anchor="middle">L0 on {escape(split)}</text>',
        f'<text x="15" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 15 {HEIGHT / 2})">FVU</text>',
    ]
    for value in x.ends:
        parts.append(
            f'<text x="{x.place(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:.3g}</text>'
        )
    for value in y.ends:
        parts.append(
            f'<text x="{left - 6}" y="{y.place(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for p in points:
        parts.append(f'<circle cx="{x.place(p.l0):.1f}" cy="{y.place(p.fvu):.1f}" r="4" fill="#036"/>')
        # names point inwards, so that none is cut off
        inward = "end" if x.place(p.l0) > WIDTH / 2 else "start"
        at = x.place(p.l0) + (-7 if inward == "end" else 7)
        where = f'x="{at:.1f}" y="{y.place(p.fvu) - 6:.1f}"'
        parts.append(f'<text {where} text-anchor="{inward}">{escape(p.name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def write_sweep(points: Sequence[Point], split: str, path: Path) -> None:
    """Write what the dictionaries came to as JSON, by L0, and whether each is on the frontier."""
    best = {point.name for point in frontier(points)}
    rows = [p._asdict() | {"on_frontier": p.name in best} for p in sorted(points, key=lambda p: p.l0)]
    path.write_text(as_json({"format_version": FORMAT_VERSION, "split": split, "members": rows}, indent=1))


def read_sweep(path: Path) -> tuple[list[Point], str]:
    """Return what `write_sweep` wrote: the dictionaries, and the split that they were measured on."""
    found = json.loads(path.read_text(encoding="utf-8"))
    # null is what JSON has for a figure that is not defined
    rows: list[list[Any]] = [
        [math.nan if row[name] is None else row[name] for name in Point._fields] for row in found["members"]
    ]
    return [Point(*row) for row in rows], found["split"]


def own_seconds(metrics: Path) -> float:
    """Return the time of a dictionary's own steps, from its metrics.jsonl.

    What an interrupted run did after its last record is not in it.
    """
    return float(
        sum(json.loads(line)["step_seconds"] for line in metrics.read_text(encoding="utf-8").splitlines())
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.fvu) and math.isfinite(p.l0)]


class _Axis(NamedTuple):
    """Maps values between `ends` to places between `begin` and `end`."""

    ends: tuple[float, float]
    begin: float
    end: float

    def place(self, value: float) -> float:
        low, high = self.ends
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)


def _axis(values: Sequence[float], begin: float, end: float) -> _Axis:
    low, high = min(values, default=0.0), max(values, default=0.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return _Axis((low - room, high + room), begin, end)
