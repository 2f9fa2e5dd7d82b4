"""The histories on a feature's page: entities on which it fires, near misses and false alarms."""

from __future__ import annotations

from itertools import groupby

from .data import Labels, Record
from .html import Markup, el
from .numbers import period, short
from .page import section
from .timeline import Frame, columns_by_contrast, frame_of, has_gap, timeline

N_COLUMNS = 6
"""Raw columns drawn at once; the others unfold."""
BANDS = {
    "top": ("Strongest", "The entities with the largest activations."),
    "middle": ("Middle third", "Drawn from the middle third of the entities on which it fires."),
    "low": ("Lowest third", "Drawn from the third on which it fires most weakly."),
    "near_miss": ("Near misses", "The concept holds somewhere, and the feature is silent throughout."),
    "false_alarm": ("False alarms", "It fires where the concept does not hold."),
}


def histories(labels: Labels, r: Record) -> Markup:
    """Return the section with a feature's example entities, band by band."""
    rows = labels.examples[r["feature"]]
    # the table is sorted by feature only; an example's rows are put together here
    rows.sort(
        key=lambda e: (
            list(BANDS).index(e["band"]) if e["band"] in BANDS else 9,
            e["band"],
            e["example"],
            e["time"],
        )
    )
    bands = {
        band: [list(h) for _, h in groupby(part, key=lambda e: e["example"])]
        for band, part in groupby(rows, key=lambda e: e["band"])
    }
    every = [h for found in bands.values() for h in found]
    title = "Histories"
    if not every:
        return section("histories", title, el("p", {"class": "none"}, "No examples were recorded."))
    unit = _unit(labels)
    threshold = r["threshold"] or 0.0
    frame = frame_of(every, threshold, lambda time: period(time, unit))
    columns = columns_by_contrast(every, threshold)
    return section(
        "histories",
        title,
        el("p", {"class": "muted"}, _HISTORIES),
        _history_key(any(has_gap(h) for h in every)),
        *(_band(labels, band, found, columns, frame) for band, found in bands.items()),
    )


def _unit(labels: Labels) -> str:
    """Return what a step of time is: the source's own calendar counts before the panel's; empty where there is none."""
    places = (("source", "coordinates", "period"), ("source", "period"), ("panel", "period"))
    return next((str(unit) for place in places if (unit := labels.config(*place))), "")


_HISTORIES = (
    "Confirmation entities, one picture each. All share the scale of the activation; a raw column has one "
    "scale too, or its own in each history where entities differ too much (*). The columns that set firing "
    "periods most apart stand first. Hover over a period for its values."
)


def _history_key(gaps: bool) -> Markup:
    items = [
        ("s-fire", "fires"),
        ("s-weak", "active below the threshold"),
        ("s-true", "ribbon: concept holds"),
        ("s-pale", "ribbon: it does not"),
        ("s-unknown", "ribbon: not applicable"),
    ]
    items += [("s-gap", "no row for this period")] if gaps else []
    return el(
        "ul",
        {"class": "key"},
        *(el("li", None, el("span", {"class": f"swatch {k}"}), " ", n) for k, n in items),
    )


def _band(
    labels: Labels, band: str, histories: list[list[Record]], columns: list[str], frame: Frame
) -> Markup:
    title, text = BANDS.get(band, (band.replace("_", " "), ""))
    cards = []
    for history in histories:
        name = labels.show_id(history[0]["entity"])
        peak = max(row["activation"] for row in history)
        first = timeline(history, columns[:N_COLUMNS], frame, name=f"history of {name}", lead=True)
        rest = None
        if columns[N_COLUMNS:]:
            more = timeline(history, columns[N_COLUMNS:], frame, name=f"other columns of {name}", lead=False)
            rest = el("details", None, el("summary", None, f"{len(columns) - N_COLUMNS} more columns"), more)
        top = el("h4", None, el("span", None, name), el("span", None, f"peak {short(peak)}"))
        cards.append(el("article", {"class": "entity"}, top, first, rest))
    return el(
        "section",
        {"id": f"band-{band}"},
        el("h3", None, title),
        el("p", {"class": "muted"}, text),
        el("div", {"class": "cards"}, *cards),
    )
