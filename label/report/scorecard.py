"""The scorecard: everything a feature was measured against, discovery beside confirmation."""

from __future__ import annotations

from label.intervals import written_ends

from .data import Labels, Record
from .html import Markup, el, join
from .numbers import bracket, count, fixed, known, p_text, share
from .page import head_cell, scroll
from .strips import Axis, Point, head, key, strip

FAMILIES = {
    "concept": "concept",
    "clock": "clock: position, start or calendar",
    "hash": "control: random bit per entity",
    "persistent": "control: persistent random signal",
    "permuted": "control: concept of other entities",
}
_LEGEND = (
    Point(None, name="skill on confirmation, with 95% interval"),
    Point(None, shape="diamond", kind="m-discover", name="skill on discovery, where it was chosen"),
)


def scorecard(labels: Labels, record: Record) -> Markup:
    """Return every pair of this feature that was measured: its concepts, clocks, and negative controls."""
    rows = labels.associations[record["feature"]]
    rows.sort(
        key=lambda r: (
            list(FAMILIES).index(r["family"]) if r["family"] in FAMILIES else 9,
            not _wins(r, record),
            -(r["skill"] or 0),
        )
    )
    axis = Axis.around(
        [r[n] for r in rows for n in ("skill_low", "skill_high", "skill_discover")], 250, high=1.0
    )
    numbers = ("Skill", "AP", "F1", "Precision", "Recall", "q", "Entities")
    heads = [
        head_cell("Measured against"),
        el("th", {"scope": "col"}, head(axis, "Skill")),
        *(head_cell(name, number=True) for name in numbers),
    ]
    body = [_row(labels, r, record, axis) for r in rows]
    table = el(
        "table", {"class": "wide"}, el("thead", None, el("tr", None, *heads)), el("tbody", None, *body)
    )
    return join([key(_LEGEND), scroll("scorecard", table)])


def _wins(row: Record, record: Record) -> bool:
    return all(row[n] == record[n] for n in ("concept", "low", "high"))


def _row(labels: Labels, r: Record, record: Record, axis: Axis) -> Markup:
    wins = r["family"] == "concept" and _wins(r, record)
    notes = [FAMILIES.get(r["family"], r["family"])] if r["family"] != "concept" else []
    notes += ["the label"] if wins else []
    notes += (
        ["rival: as good or better within the intervals"]
        if r["concept"] in (record["rivals"] or []) and not wins
        else []
    )
    notes += ["asked for by the concept, not by the feature"] if r["rank"] == -1 and not wins else []
    notes += [interval_of(r)] if interval_of(r) else []
    name = labels.concept_text.get(r["concept"], r["concept"])
    shown = el("strong", None, name) if wins else name
    kind = "m-main" if r["family"] == "concept" else "m-null"
    points = [
        Point(r["skill"], r["skill_low"], r["skill_high"], kind=kind, name="confirmation"),
        _LEGEND[1]._replace(value=r["skill_discover"], name="discovery"),
    ]
    discovered = {"skill": r["skill_discover"], "f1": r["f1_discover"]}
    cells = [
        el("td", {"class": "text"}, shown, *(el("small", None, n) for n in notes)),
        el("td", None, strip(axis, points)),
    ]
    for measure in ("skill", "ap", "f1", "precision", "recall"):
        before = discovered.get(measure)
        below = el("small", None, f"discovery {fixed(before)}") if known(before) else None
        cells.append(
            el("td", {"class": "n"}, fixed(r[measure]), el("small", None, bracket(r, measure)), below)
        )
    cells.append(el("td", {"class": "n"}, p_text(r["q_value"])))
    cells.append(
        el(
            "td",
            {"class": "n"},
            count(r["n_entities"]),
            el("small", None, f"{share(r['prevalence'])} of rows"),
        )
    )
    return el("tr", None, *cells)


def interval_of(record: Record) -> str:
    """Return the interval of values a numeric concept is taken in, lower end included."""
    low, high = written_ends(record["low"], record["high"])
    if not high:
        return f"at least {low}" if low else ""
    return f"from {low} to below {high}" if low else f"below {high}"


def without_model(record: Record) -> Markup:
    """Return the feature's skill beside what a raw column and the untrained twin reach on its concept."""
    rows = [
        (
            "this feature",
            Point(record["skill"], record["skill_low"], record["skill_high"], name="this feature"),
        ),
        (
            f"raw column: {record['raw_column'] or 'none'}",
            Point(record["raw_skill"], shape="square", kind="m-raw", name="raw column"),
        ),
        (
            f"untrained twin: feature {'none' if record['twin_feature'] is None else record['twin_feature']}",
            Point(record["twin_skill"], shape="triangle", kind="m-twin", name="untrained twin"),
        ),
    ]
    axis = Axis.around([v for _, p in rows for v in (p.value, p.low, p.high)], 260, high=1.0)
    body = [
        el(
            "tr",
            None,
            el("th", {"scope": "row"}, name),
            el("td", None, strip(axis, [point])),
            el("td", {"class": "n"}, fixed(point.value)),
        )
        for name, point in rows
    ]
    top = el(
        "tr",
        None,
        el("th"),
        el("th", {"scope": "col"}, head(axis, "skill on confirmation")),
        el("th", {"class": "n"}),
    )
    return el("table", {"class": "plain"}, el("thead", None, top), el("tbody", None, *body))
