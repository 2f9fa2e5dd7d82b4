"""Where a report comes from: the run's record and the evaluation, as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .data import Labels
from .html import Child, Markup, el
from .numbers import NONE


def provenance(labels: Labels) -> list[Child]:
    """Return the run's record: single values first, then its trees, folded."""
    if not labels.run and not labels.evaluation:
        return [el("p", {"class": "none"}, "Nothing is recorded about the run.")]
    parts: list[Child] = []
    simple: list[tuple[Child, Child]] = [
        (k, _value(v)) for k, v in labels.run.items() if not isinstance(v, Mapping)
    ]
    if simple:
        parts.append(_values(simple))
    trees = [(k, v) for k, v in labels.run.items() if isinstance(v, Mapping)]
    trees += [("evaluation of the dictionary", labels.evaluation)] if labels.evaluation else []
    for name, tree in trees:
        rows = [(k, _value(v)) for k, v in flat(tree)]
        parts.append(el("details", None, el("summary", None, name, f" ({len(rows)})"), _values(rows)))
    return parts


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a tree with dotted names."""
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out += flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return out


def _value(value: object) -> Markup:
    if isinstance(value, list | tuple):
        return el("code", None, ", ".join(str(v) for v in value))
    return el("code", None, NONE if value is None else value)


def _values(rows: Iterable[tuple[Child, Child]]) -> Markup:
    body = [el("tr", None, el("th", {"scope": "row"}, k), el("td", None, v)) for k, v in rows]
    return el("table", {"class": "plain prov"}, el("tbody", None, *body))
