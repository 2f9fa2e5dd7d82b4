"""Building HTML and SVG as values: whatever is not `Markup` is text, and text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape

Child = object
"""`Markup` is taken as it is, None is left out, anything else is text."""


class Markup(str):
    """Text that is HTML already; only this module makes it from pieces."""

    __slots__ = ()


VOID = frozenset({"meta", "input", "line", "rect", "path", "circle", "br", "hr"})
"""Elements that have no children here; SVG shapes with a tooltip are written through `el` with children."""


def text(value: object) -> Markup:
    """Return a value as escaped text; Markup and nothing pass through."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else escape(str(value), quote=True))


def el(name: str, attributes: Mapping[str, object] | None = None, *children: Child) -> Markup:
    """Return one element.

    Parameters
    ----------
    attributes
        None and False leave an attribute out, True writes it bare, floats are rounded to one decimal.

    Examples
    --------
    >>> el("p", {"class": "note", "hidden": False}, "a < b")
    '<p class="note">a &lt; b</p>'
    """
    opening = name
    for key, value in (attributes or {}).items():
        if value is None or value is False:
            continue
        opening += f" {key}" if value is True else f' {key}="{_attribute(value)}"'
    if name in VOID and not children:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Markup:
    """Return the children one after another, escaped where they are text."""
    return Markup(text(between).join(text(child) for child in children))


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return coordinate(value)
    return escape(str(value), quote=True)


def coordinate(value: float) -> str:
    """Return a number for SVG with at most one decimal: a tenth of a pixel is enough."""
    if not math.isfinite(value):
        raise ValueError(f"a coordinate is {value}")
    short = f"{value:.1f}".removesuffix(".0")
    return "0" if short == "-0" else short
