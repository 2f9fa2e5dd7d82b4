"""The first page: the headline, how far to trust it, and the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from .catalogue import concept_table, feature_table, group_table
from .data import Labels
from .html import Child, Markup, el, join
from .numbers import count, fixed, known, share, short
from .page import WARNING, head_cell, page, section
from .provenance import provenance
from .strips import Axis, Point, bar, head, strip

SECTIONS = (
    ("faithfulness", "Faithfulness"),
    ("unlabelled", "Unlabelled"),
    ("features", "Features"),
    ("concepts", "Concepts"),
    ("groups", "Groups"),
    ("provenance", "Provenance"),
)
CONTROLS = {
    "hash": "a random bit per entity",
    "persistent": "random signals of matched prevalence and persistence",
    "permuted": "real concepts of another entity",
}
SPLITS = (
    "Thresholds and candidates were chosen on the discovery entities; every figure is from confirmation "
    "entities."
)


def index_page(labels: Labels) -> str:
    """Return the first page."""
    bar_ = [
        el("a", {"href": "index.html", "class": "here", "aria-current": "page"}, labels.name),
        el("span", {"class": "far"}, *(el("a", {"href": f"#{anchor}"}, title) for anchor, title in SECTIONS)),
    ]
    return page(
        f"{labels.name}: feature dictionary",
        join(bar_),
        el("p", {"class": "eyebrow"}, _origin(labels)),
        el("h1", None, f"{labels.name}: what the features encode"),
        _headline(labels),
        el("p", {"class": "warning"}, WARNING),
        section("faithfulness", "How faithful the dictionary is", *_faithfulness(labels)),
        el("div", {"class": "pair"}, _reasons(labels), _controls(labels)),
        section("baselines", "What the concepts are worth without the model", *_baselines(labels)),
        section("features", "Features", el("p", {"class": "muted"}, SPLITS), feature_table(labels)),
        section("concepts", "Concepts", el("p", {"class": "muted"}, _CONCEPTS), concept_table(labels)),
        section("groups", "Groups", el("p", {"class": "muted"}, _GROUPS), group_table(labels, labels.groups)),
        section("provenance", "Where this comes from", *provenance(labels)),
    )


_CONCEPTS = (
    "Every concept with its best feature, chosen on discovery whether or not it became a label. A concept "
    "is a function of the input: only what exceeds both the raw column and the untrained twin was learned."
)
_GROUPS = "Unions of features, each at its own threshold, for concepts that several features tile."


def _origin(labels: Labels) -> str:
    hooks = labels.config("harvest", "hooks")
    parts = [
        labels.config("model", "kind"),
        ", ".join(hooks) if isinstance(hooks, list | tuple) else hooks,
        labels.config("sae", "kind"),
        f"{count(labels.summary['n_features'])} features",
    ]
    return " · ".join(str(p) for p in parts if p)


def _headline(labels: Labels) -> Markup:
    s = labels.summary
    of = f"of {count(s['n_features'])} features, {count(s['n_labelled'])} of which carry a label"
    first = el("dd", None, "labelled, learned and used", el("small", None, of))
    second = el(
        "dd",
        None,
        "labelled and used",
        el(
            "small",
            None,
            "the model relies on them, but a raw column or an untrained network may show the same",
        ),
    )
    figures = el(
        "dl",
        {"class": "headline"},
        el("dt", {"id": "learned-and-used"}, count(s["n_learned_and_used"])),
        first,
        el("dt", {"class": "second", "id": "used"}, count(s["n_used"])),
        second,
    )
    removal = s.get("removal")
    if not removal:
        return figures
    text = (
        f"Removing all used features together moves the default logit by {short(removal['used_together'])} "
        f"on average, removing every feature by {short(removal['all_features'])} (mean absolute change, "
        f"{count(removal.get('entities'))} entities)."
    )
    return join([figures, el("p", {"class": "lead"}, text)])


def _tile(value: str, name: str, ident: str) -> Markup:
    return el("div", {"class": "tile"}, el("b", {"id": ident}, value), el("span", None, name))


def _faithfulness(labels: Labels) -> list[Child]:
    s = labels.summary
    f: Mapping[str, Any] = s.get("fidelity") or {}
    dead = f"{count(s['n_dead'])} ({share(s['n_dead'] / max(s['n_features'], 1))})"
    tiles = [
        _tile(
            fixed(f.get("fvu"), 3), "FVU: share of the activations' variance that is not reconstructed", "fvu"
        ),
        _tile(fixed(f.get("l0"), 1), "L0: mean active features per row", "l0"),
        _tile(dead, "features that fire neither on discover nor on confirm", "dead"),
    ]
    if known(f.get("mean_abs_dpd")):
        name = "mean absolute change of the PD when the reconstruction takes the activations' place"
        tiles.append(_tile(short(f["mean_abs_dpd"]), name, "dpd"))
    return [el("div", {"class": "tiles"}, *tiles), _auc(f)]


def _auc(fidelity: Mapping[str, Any]) -> Markup:
    rows: list[tuple[str, str, Point]] = [
        ("auc_model", "model", Point(fidelity.get("auc_model"), name="model")),
        (
            "auc_spliced",
            "model with the reconstruction spliced in",
            Point(fidelity.get("auc_spliced"), shape="diamond", kind="m-twin", name="spliced"),
        ),
        (
            "auc_reference",
            "reference model on the same information",
            Point(fidelity.get("auc_reference"), shape="square", kind="m-raw", name="reference"),
        ),
    ]
    rows = [r for r in rows if known(r[2].value)]
    if not rows:
        return el("p", {"class": "none"}, "No outcome, so there is no AUC.")
    values = [r[2].value for r in rows if r[2].value is not None]
    axis = Axis.around(values, 420, low=min(0.5, *values), high=1.0)
    body = [
        el(
            "tr",
            None,
            el("th", {"scope": "row"}, title),
            el("td", None, strip(axis, [point])),
            el("td", {"class": "n", "id": name}, fixed(point.value, 3)),
        )
        for name, title, point in rows
    ]
    top = el(
        "tr",
        None,
        el("th"),
        el("th", {"scope": "col"}, head(axis, "AUC for default, confirmation entities")),
        el("th", {"class": "n"}),
    )
    return el(
        "div",
        {"class": "scroll"},
        el("table", {"class": "plain"}, el("thead", None, top), el("tbody", None, *body)),
    )


def _reasons(labels: Labels) -> Markup:
    reasons: dict[str, int] = labels.summary["reasons"]
    texts = {
        f["reason"]: f["description"].removeprefix("unlabelled: ") for f in labels.features if f["reason"]
    }
    axis = Axis.around(list(reasons.values()), 170)
    body = [
        el(
            "tr",
            {"data-reason": name},
            el(
                "th",
                {"scope": "row", "class": "text"},
                name.replace("_", " "),
                el("small", {"class": "muted"}, " ", texts.get(name)),
            ),
            el("td", None, bar(axis, n, "b-null")),
            el(
                "td",
                {"class": "n"},
                count(n),
                el("small", None, share(n / max(labels.summary["n_features"], 1))),
            ),
        )
        for name, n in sorted(reasons.items(), key=lambda item: -item[1])
    ]
    total = sum(reasons.values())
    note = (
        f"{count(total)} of {count(labels.summary['n_features'])} features carry no label; the first "
        "reason that applies is counted."
    )
    return section(
        "unlabelled",
        "Why the others are unlabelled",
        el("p", {"class": "muted"}, note),
        el("table", {"class": "plain", "id": "reasons"}, el("tbody", None, *body)),
    )


def _controls(labels: Labels) -> Markup:
    s = labels.summary
    body = [
        el(
            "tr",
            None,
            el("th", {"scope": "row"}, CONTROLS.get(name, name.replace("_", " "))),
            el("td", {"class": "n"}, count(n)),
            el("td", {"class": "n muted"}, share(n / max(s["n_features"], 1))),
        )
        for name, n in s["controls"].items()
    ]
    top = el(
        "tr",
        None,
        *(head_cell(t, number=i > 0) for i, t in enumerate(("Control", "Features it would label", "Share"))),
    )
    test = s.get("test_calibration") or {}
    checked = None
    # labels of an earlier version were tested in another way
    if known(test.get("plain_rejected_at_0.05")):
        checked = el(
            "p",
            None,
            f"Every pair is compared with its own statistics under permuted trajectories. Of all {count(test.get('n'))} "
            f"of these the test rejects {share(test['rejected_at_0.05'])} at the 5% level "
            f"({share(test['plain_rejected_at_0.05'])} if they were held against a normal distribution instead); "
            f"p-values are widened by an inflation of {fixed(test.get('inflation'))} (1 = as light a tail as expected).",
        )
    return section(
        "controls",
        "Negative controls",
        el(
            "p",
            {"class": "muted"},
            "Signals that mean nothing, judged by the same rule as the concepts. None should pass.",
        ),
        el("table", {"id": "controls-table"}, el("thead", None, top), el("tbody", None, *body)),
        checked,
        el(
            "p",
            {"class": "muted"},
            f"False discovery rate among the pairs that pass on confirmation: at most {short(s['fdr_q'])}.",
        ),
    )


def _baselines(labels: Labels) -> list[Child]:
    rows = [c for c in labels.concepts if known(c["skill"])]
    if not rows:
        return [el("p", {"class": "none"}, "No concept could be measured.")]
    names = (
        ("skill", "best feature of this dictionary", "b-main"),
        ("raw_skill", "best raw column", "b-raw"),
        ("twin_skill", "untrained twin's best feature", "b-twin"),
    )
    shared = [c for c in rows if all(known(c[n]) for n, *_ in names if any(known(r[n]) for r in rows))]
    means = [(n, title, kind, _mean(c[n] for c in shared)) for n, title, kind in names]
    axis = Axis.around([m for *_, m in means], 420, high=1.0)
    body = [
        el(
            "tr",
            None,
            el("th", {"scope": "row"}, title),
            el("td", None, bar(axis, value, kind)),
            el("td", {"class": "n", "id": f"mean-{name}"}, fixed(value)),
        )
        for name, title, kind, value in means
        if value is not None
    ]
    others = {"raw_skill": "the raw column", "twin_skill": "the twin"}
    measured = [n for n in others if any(known(c[n]) for c in shared)]
    best = [c for c in shared if all(c["skill_low"] > c[n] for n in measured)]
    what = " and ".join(others[n] for n in measured)
    above = (
        f"On {len(best)} of them the best feature's whole interval lies above {what}. " if measured else ""
    )
    note = f"Mean skill over {len(shared)} concepts. {above}Each concept is shown under Concepts."
    top = el(
        "tr", None, el("th"), el("th", {"scope": "col"}, head(axis, "mean skill")), el("th", {"class": "n"})
    )
    table = el("table", {"class": "plain"}, el("thead", None, top), el("tbody", None, *body))
    return [el("p", {"class": "muted"}, note), el("div", {"class": "scroll"}, table)]


def _mean(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None and known(v)]
    return fmean(there) if there else None
