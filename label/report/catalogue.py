"""The three tables of the first page: features, concepts, groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .data import Labels, Record
from .html import Child, Markup, el, join
from .numbers import NONE, bracket, count, fixed, known, share, signed
from .page import head_cell, scroll
from .scorecard import interval_of
from .strips import Axis, Point, head, key, strip

BASELINES = (
    Point(None, kind="m-main", name="best feature of the dictionary, with 95% interval"),
    Point(None, shape="square", kind="m-raw", name="best raw column"),
    Point(None, shape="triangle", kind="m-twin", name="untrained twin's best feature"),
)


def feature_link(labels: Labels, feature: int | None, content: Child = None) -> Markup:
    """Return a feature's number, as a link from the first page where it has a page of its own."""
    if feature is None:
        return Markup(NONE)
    shown = str(feature) if content is None else content
    at = labels.pages.get(feature)
    return el("a", {"href": at}, shown) if at else el("span", None, shown)


def strength(record: Record) -> tuple[bool, bool, bool, float]:
    """Return what puts one feature before another: used and learned, then used, then labelled, then skill."""
    labelled = record["status"] == "labelled"
    used = labelled and bool(record["used"])
    skill = record["skill"]
    return (used and bool(record["learned"]), used, labelled, skill if known(skill) else -1.0)


def feature_table(labels: Labels) -> Markup:
    """Return every feature, labelled or not, with the means to sort and filter."""
    rows = sorted(labels.features, key=strength, reverse=True)
    axis = Axis.around([r["skill_low"] for r in rows if r["status"] == "labelled"], 150, high=1.0)
    heads = [
        head_cell("Feature", number=True, sort=True),
        head_cell("What it encodes", sort=True),
        head_cell("Learned", sort=True, hint="its skill exceeds the raw column's and the twin's"),
        head_cell("Used", sort=True, hint="removing it moves the default logit more than its controls do"),
        head_cell(
            "Skill",
            number=True,
            sort=True,
            hint="(AP - prevalence) / (1 - prevalence) on confirm, 95% interval",
        ),
        el("th", {"scope": "col"}, head(axis, "Skill, 95% interval")),
        head_cell("F1", number=True, sort=True),
        head_cell("Precision", number=True, sort=True),
        head_cell("Recall", number=True, sort=True),
        head_cell("Prevalence", number=True, sort=True, hint="share of rows on which the concept holds"),
        head_cell("Entities", number=True, sort=True, hint="entities in which the concept holds"),
        head_cell("Fires on", number=True, sort=True, hint="share of rows"),
        head_cell(
            "Effect", number=True, sort=True, hint="mean change of the default logit when it is removed"
        ),
    ]
    body = [_feature_row(labels, row, axis) for row in rows]
    table = el(
        "table",
        {"class": "wide sortable", "id": "feature-table"},
        el("thead", None, el("tr", None, *heads)),
        el("tbody", None, *body),
    )
    return join([_tools(labels), scroll("features", table)])


def _feature_row(labels: Labels, record: Record, axis: Axis) -> Markup:
    labelled = record["status"] == "labelled"
    flags = [record["status"]]
    if labelled:
        flags += [name for name in ("learned", "used") if record[name]]
        flags += ["learned-and-used"] if record["learned"] and record["used"] else []
    data = {
        "data-status": " ".join(flags),
        "data-reason": record["reason"] or "",
        "data-category": _slug(record["category"] or ""),
    }
    point = Point(
        record["skill"], record["skill_low"], record["skill_high"], kind="m-main" if labelled else "m-null"
    )
    cells = [
        el("td", {"class": "n", "data-v": record["feature"]}, feature_link(labels, record["feature"])),
        el("td", {"class": "text"}, _says(labels, record)),
        _verdict(record["learned"] if labelled else None, labelled),
        _verdict(record["used"] if labelled else None, labelled),
        number_cell(record["skill"], fixed(record["skill"]), bracket(record, "skill")),
        el("td", None, strip(axis, [point]) if known(record["skill"]) else None),
        *(number_cell(record[n], fixed(record[n])) for n in ("f1", "precision", "recall")),
        number_cell(record["prevalence"], share(record["prevalence"])),
        number_cell(record["n_entities"], count(record["n_entities"])),
        number_cell(record["firing_rate"], share(record["firing_rate"])),
        number_cell(record["effect"], signed(record["effect"], 3)),
    ]
    return el("tr", data, *cells)


def _says(labels: Labels, record: Record) -> Markup:
    if record["status"] == "labelled":
        return feature_link(labels, record["feature"], record["title"])
    nearest = el("small", None, "nearest: ", record["title"]) if record["title"] else None
    return join([record["description"], nearest])


def _verdict(value: bool | None, labelled: bool) -> Markup:
    if not labelled:
        return el("td", {"class": "unset", "data-v": ""})
    kind, shown = {True: ("yes", "✓ yes"), False: ("no", "✗ no"), None: ("unset", "not assessed")}[value]
    return el("td", {"class": kind}, shown)


def number_cell(value: float | None, shown: str, below: str = "") -> Markup:
    """Return a figure that sorts by its value; what is not known sorts last."""
    raw = "" if not known(value) else repr(value)
    return el("td", {"class": "n", "data-v": raw}, shown, el("small", None, below) if below else None)


def _tools(labels: Labels) -> Markup:
    reasons = {r["reason"]: r["reason"].replace("_", " ") for r in labels.features if r["reason"]}
    categories = {_slug(r["category"]): r["category"] for r in labels.features if r["category"]}
    states = {
        "learned-and-used": "labelled, learned and used",
        "used": "labelled and used",
        "learned": "labelled and learned",
        "labelled": "labelled",
        "unlabelled": "unlabelled",
    }
    field = el("input", {"type": "search", "placeholder": "words in any column", "autocomplete": "off"})
    return el(
        "div",
        {"class": "tools", "data-for": "feature-table", "hidden": True},
        el("label", None, "Search", field),
        _choice("status", "Verdict", states, chosen="labelled" if labels.labelled else ""),
        _choice("reason", "Reason it is unlabelled", dict(sorted(reasons.items()))),
        _choice("category", "Category", dict(sorted(categories.items()))),
        el("output", {"aria-live": "polite"}),
    )


def _choice(name: str, title: str, options: dict[str, str], chosen: str = "") -> Markup:
    items = [
        el("option", {"value": value, "selected": value == chosen}, shown)
        for value, shown in [("", "all"), *options.items()]
    ]
    return el("label", None, title, el("select", {"name": name}, *items))


def _slug(category: str) -> str:
    return "-".join(category.lower().split())


def concept_table(labels: Labels) -> Markup:
    """Return what could be evaluated, with best feature, raw column and twin; then what could not."""
    rows = [c for c in labels.concepts if c["applicable"] and known(c["skill"])]
    rows.sort(key=lambda c: -c["skill"])
    named = ("skill", "skill_low", "skill_high", "raw_skill", "twin_skill")
    axis = Axis.around([c[n] for c in rows for n in named], 300, high=1.0)
    heads = [
        head_cell("Concept", sort=True),
        head_cell("Category", sort=True),
        head_cell("Best feature", number=True, sort=True),
        el("th", {"scope": "col"}, head(axis, "Skill on confirm")),
        head_cell("Feature", number=True, sort=True, hint="skill of the best feature"),
        head_cell("Raw column", number=True, sort=True, hint="skill of the best raw column"),
        head_cell("Twin", number=True, sort=True, hint="skill of the untrained twin's best feature"),
        head_cell("F1", number=True, sort=True),
        head_cell("Prevalence", number=True, sort=True),
        head_cell("Labels", number=True, sort=True, hint="features whose label is this concept"),
    ]
    body = [_concept_row(labels, row, axis) for row in rows]
    table = el(
        "table",
        {"class": "wide sortable"},
        el("thead", None, el("tr", None, *heads)),
        el("tbody", None, *body),
    )
    return join([key(BASELINES), scroll("concepts", table), _without(labels)])


def _concept_row(labels: Labels, c: Record, axis: Axis) -> Markup:
    points = [
        BASELINES[0]._replace(
            value=c["skill"], low=c["skill_low"], high=c["skill_high"], name="best feature"
        ),
        BASELINES[1]._replace(value=c["raw_skill"], name=f"raw column {c['raw_column'] or ''}".rstrip()),
        BASELINES[2]._replace(value=c["twin_skill"], name="untrained twin"),
    ]
    interval = el("small", None, interval_of(c)) if interval_of(c) else None
    cells = [
        el(
            "td",
            {"class": "text"},
            c["text"] or c["concept"],
            el("small", {"class": "id"}, c["concept"]),
            interval,
        ),
        el("td", None, c["category"]),
        el("td", {"class": "n", "data-v": c["feature"]}, feature_link(labels, c["feature"])),
        el("td", None, strip(axis, points)),
        number_cell(c["skill"], fixed(c["skill"]), bracket(c, "skill")),
        number_cell(c["raw_skill"], fixed(c["raw_skill"]), c["raw_column"] or ""),
        number_cell(c["twin_skill"], fixed(c["twin_skill"])),
        number_cell(c["f1"], fixed(c["f1"])),
        number_cell(c["prevalence"], share(c["prevalence"])),
        number_cell(c["n_labelled"], count(c["n_labelled"])),
    ]
    return el("tr", None, *cells)


def _without(labels: Labels) -> Markup | None:
    rows = [c for c in labels.concepts if not (c["applicable"] and known(c["skill"]))]
    if not rows:
        return None
    body = [
        el(
            "tr",
            None,
            el("td", {"class": "id"}, c["concept"]),
            el("td", {"class": "text"}, c["text"]),
            el("td", None, c["reason"] or "no feature was measured on it"),
        )
        for c in rows
    ]
    top = el("tr", None, *(head_cell(name) for name in ("Concept", "Text", "Why it was not compared")))
    return join(
        [
            el("h3", None, f"Not applicable or not measurable here: {len(rows)}"),
            scroll(
                "concepts without figures",
                el("table", None, el("thead", None, top), el("tbody", None, *body)),
            ),
        ]
    )


def group_table(labels: Labels, groups: Iterable[Record]) -> Markup:
    """Return unions of features that cover a concept together, beside their first feature alone."""
    rows: Sequence[Record] = sorted(groups, key=lambda g: -(g["f1"] or 0.0))
    if not rows:
        return el("p", {"class": "none"}, "No group was grown.")
    axis = Axis.around([g["f1_low"] for g in rows], 200, high=1.0)
    legend = key(
        [
            Point(None, name="group, with 95% interval"),
            Point(None, shape="diamond", kind="m-discover", name="its first feature alone"),
        ]
    )
    heads = [
        head_cell("Concept", sort=True),
        head_cell("Features"),
        el("th", {"scope": "col"}, head(axis, "F1 on confirm")),
        head_cell("F1", number=True, sort=True),
        head_cell("Alone", number=True, sort=True, hint="F1 of the group's first feature"),
        head_cell("Precision", number=True, sort=True),
        head_cell("Recall", number=True, sort=True),
        head_cell("Prevalence", number=True, sort=True),
        head_cell("Entities", number=True, sort=True),
    ]
    body = []
    for g in rows:
        single = Point(g["single_f1"], shape="diamond", kind="m-discover", name="first feature alone")
        whole = Point(g["f1"], g["f1_low"], g["f1_high"], name="group")
        cells = [
            el("td", {"class": "text"}, g["title"] or g["concept"]),
            el("td", None, join([feature_link(labels, f) for f in g["features"] or []], ", ")),
            el("td", None, strip(axis, [whole, single])),
            number_cell(g["f1"], fixed(g["f1"]), bracket(g, "f1")),
            number_cell(g["single_f1"], fixed(g["single_f1"])),
            number_cell(g["precision"], fixed(g["precision"]), bracket(g, "precision")),
            number_cell(g["recall"], fixed(g["recall"]), bracket(g, "recall")),
            number_cell(g["prevalence"], share(g["prevalence"])),
            number_cell(g["n_entities"], count(g["n_entities"])),
        ]
        body.append(el("tr", None, *cells))
    table = el(
        "table",
        {"class": "wide sortable"},
        el("thead", None, el("tr", None, *heads)),
        el("tbody", None, *body),
    )
    return join([legend, scroll("groups", table)])
