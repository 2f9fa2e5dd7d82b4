"""The page of one labelled feature: what it says, the evidence, who it fires on, how the model uses it."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from . import effect
from .data import Labels, Record
from .histogram import histogram, silent
from .histories import histories
from .html import Child, Markup, el, join
from .numbers import NONE, bracket, count, fixed, known, p_text, share, short, signed, span
from .page import facts, page, section
from .scorecard import interval_of, scorecard, without_model


def feature_page(labels: Labels, record: Record) -> str:
    """Return the page of a labelled feature."""
    number = record["feature"]
    return page(
        f"Feature {number}: {record['title']}",
        _navigation(labels, number),
        el(
            "p",
            {"class": "eyebrow"},
            f"Feature {number}",
            f" · {record['category']}" if record["category"] else None,
        ),
        el("h1", None, record["title"]),
        el("p", {"class": "lead"}, record["description"]),
        el("div", {"class": "verdicts"}, _label(record), _learned(record), _used(record)),
        el("div", {"class": "pair"}, _definition(labels, record), _neighbours(labels, record)),
        _activation(labels, record),
        section(
            "scorecard",
            "Scorecard",
            el("p", {"class": "muted"}, _SCORECARD),
            scorecard(labels, record),
            el("h3", None, "Without the trained model"),
            el("div", {"class": "scroll"}, without_model(record)),
        ),
        _effect(labels, record),
        histories(labels, record),
    )


_SCORECARD = (
    "The concept was chosen on discovery entities and measured once on confirmation entities. Clocks and "
    "negative controls stand beside it: a feature that they explain as well has no label."
)

_NOT_ASSESSED = (
    "There was no model or no outcome, or removing it moved the logit of too few entities to tell."
)


def _relative(target: str) -> str:
    return PurePosixPath(os.path.relpath(target, "features")).as_posix()


def _link(labels: Labels, feature: int, content: Child = None) -> Markup:
    at = labels.pages.get(feature)
    shown = feature if content is None else content
    return el("a", {"href": _relative(at)}, shown) if at else el("span", None, shown)


def _navigation(labels: Labels, number: int) -> Markup:
    order = [f["feature"] for f in labels.labelled]
    i = order.index(number)
    before, after = order[i - 1] if i else None, order[i + 1] if i + 1 < len(order) else None
    far = [
        el("span", {"class": "muted"}, f"{i + 1} of {len(order)} labelled"),
        _step(labels, before, "prev", "← {}"),
        _step(labels, after, "next", "{} →"),
    ]
    home = el("a", {"href": "../index.html#features"}, labels.name)
    return join(
        [
            home,
            el("span", {"class": "here", "aria-current": "page"}, f"Feature {number}"),
            el("span", {"class": "far"}, *far),
        ]
    )


def _step(labels: Labels, feature: int | None, rel: str, form: str) -> Markup:
    if feature is None:
        return el("span", {"class": "muted"}, form.format("none"))
    title = {"prev": "previous", "next": "next"}[rel]
    attributes = {
        "href": _relative(labels.pages[feature]),
        "rel": rel,
        "title": f"{title} labelled feature (arrow key)",
    }
    return el("a", attributes, form.format(f"feature {feature}"))


def _card(
    title: str, verdict: bool | None, items: list[tuple[Child, Child]], note: str | None = None
) -> Markup:
    kind, sign = {True: ("yes", "✓"), False: ("no", "✗"), None: ("unset", NONE)}[verdict]
    note_ = el("p", None, note) if note else None
    return el("section", {"class": f"verdict {kind}"}, el("h2", None, f"{sign} {title}"), facts(items), note_)


def _label(r: Record) -> Markup:
    items: list[tuple[Child, Child]] = [
        ("Skill", span(r, "skill")),
        ("Precision", span(r, "precision")),
        ("Recall", span(r, "recall")),
        ("F1", span(r, "f1")),
        ("q-value", p_text(r["q_value"])),
        ("Best control's skill", f"{fixed(r['control_skill'])}"),
        ("Best clock's skill", f"{fixed(r['clock_skill'])}"),
    ]
    rivals = f"As good or better within the intervals: {', '.join(r['rivals'])}." if r["rivals"] else None
    return _card("Labelled", True, items, rivals)


def _learned(r: Record) -> Markup:
    title = {True: "Learned", False: "Not learned", None: "Learned: not assessed"}[r["learned"]]
    items: list[tuple[Child, Child]] = [
        ("Raw column's skill", fixed(r["raw_skill"])),
        ("Above the raw column", _difference(r, "over_raw")),
        ("Twin's skill", fixed(r["twin_skill"])),
        ("Above the untrained twin", _difference(r, "over_twin")),
    ]
    note = None
    if r["learned"] is False:
        restates = known(r["over_raw_low"]) and not r["over_raw_low"] > 0
        note = f"It restates {r['raw_column']}." if restates else "An untrained network does as well."
    return _card(title, r["learned"], items, note)


def _used(r: Record) -> Markup:
    title = {True: "Used", False: "Not used", None: "Used: not assessed"}[r["used"]]
    if r["used"] is None:
        return _card(title, None, [], _NOT_ASSESSED)
    items: list[tuple[Child, Child]] = [
        ("Logit without it", f"{signed(r['effect'], 3)} {bracket(r, 'effect', 3)}"),
        ("Mean |change|", f"{fixed(r['effect_size'], 3)} {bracket(r, 'effect_size', 3)}"),
        ("Above random", _difference(r, "over_random", 3)),
        ("Above matched", _difference(r, "over_matched", 3)),
        ("Share of removing all", share(r["effect_share"])),
    ]
    one_way = known(r["effect_low"]) and r["effect_low"] * r["effect_high"] > 0
    note = f"On average its presence {'raises' if r['effect'] < 0 else 'lowers'} the PD." if one_way else None
    return _card(title, r["used"], items, note)


def _difference(r: Record, name: str, digits: int = 2) -> str:
    return f"{signed(r[name], digits)} {bracket(r, name, digits)}".rstrip()


def _definition(labels: Labels, r: Record) -> Markup:
    items: list[tuple[Child, Child]] = [
        ("Concept", el("span", {"class": "id"}, r["concept"])),
        ("Interval of values", interval_of(r) or "true or false"),
        ("Fires strictly above", short(r["threshold"])),
        ("Mean activation where it fires", short(r["mean_activation"])),
        ("Largest activation", short(r["max_activation"])),
        ("Fires on rows, confirmation", share(r["firing_rate"])),
        ("Fires on rows, discovery", share(r["firing_rate_discover"])),
        ("Concept holds on rows", share(r["prevalence"])),
        ("Entities with / without it", f"{count(r['n_entities'])} / {count(r['n_entities_without'])}"),
        ("Entities on which it fires", count(r["n_entities_firing"])),
    ]
    return section("definition", "Definition and support", facts(items, "facts"))


def _neighbours(labels: Labels, r: Record) -> Markup:
    others = [f for f in labels.by_concept.get(r["concept"], []) if f["feature"] != r["feature"]]
    others.sort(key=lambda f: (f["status"] != "labelled", -(f["skill"] or 0.0)))
    items = [
        el(
            "li",
            None,
            _link(labels, f["feature"], f"Feature {f['feature']}"),
            ": ",
            interval_of(f) or "the concept",
            f", skill {fixed(f['skill'])}",
            el(
                "span",
                {"class": "muted"},
                f", unlabelled ({f['reason'].replace('_', ' ')})" if f["reason"] else "",
            ),
        )
        for f in others[:12]
    ]
    more = el("p", {"class": "muted"}, f"and {len(others) - 12} more") if len(others) > 12 else None
    found = (
        el("ul", None, *items)
        if items
        else el("p", {"class": "none"}, "No other feature has this as its best concept.")
    )
    groups = [g for g in labels.groups if r["feature"] in (g["features"] or [])]
    joined = [
        el(
            "li",
            None,
            g["title"] or g["concept"],
            ": features ",
            join([_link(labels, f) for f in g["features"]], ", "),
            f"; F1 {span(g, 'f1')} together, {fixed(g['single_f1'])} alone",
        )
        for g in groups
    ]
    return section(
        "neighbours",
        "Features with the same concept",
        found,
        more,
        *([el("h3", None, "Groups it belongs to"), el("ul", None, *joined)] if joined else []),
    )


def _activation(labels: Labels, r: Record) -> Markup:
    bins = labels.histograms[r["feature"]]
    if not bins:
        return section("activation", "Activation", el("p", {"class": "none"}, "No histogram was recorded."))
    plots = [el("div", {"class": "chart"}, p) for p in (histogram(bins, r["threshold"]), silent(bins))]
    return section("activation", "Activation", el("div", {"class": "pair"}, *plots))


def _effect(labels: Labels, r: Record) -> Markup:
    values = [e["change"] for e in labels.effects[r["feature"]] if known(e["change"])]
    title = "Effect on the PD"
    if not values or r["used"] is None:
        return section("effect", title, el("p", {"class": "none"}, _NOT_ASSESSED))
    note = (
        "The feature's contribution is subtracted at every position of held-out histories on which it "
        "fires; the rest, and what the dictionary does not explain, stay. Random directions have the same "
        "norm at the same positions; matched features fire as often and as strongly."
    )
    return section(
        "effect",
        title,
        el("p", {"class": "muted"}, note),
        el(
            "div",
            {"class": "pair"},
            el("div", {"class": "chart"}, effect.changes(r, values)),
            el("div", {"class": "chart"}, effect.sizes(r), effect.differences(r)),
        ),
    )
