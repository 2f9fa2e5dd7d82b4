"""A concept check as a table for the terminal."""

from __future__ import annotations

from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from activations_cache.tables import written_period

from .check import REDUNDANT, CheckReport, ConceptCheck


def render(report: CheckReport) -> RenderableType:
    """Return the check as a rich renderable: concepts by category, warnings, and what does not apply."""
    table = Table(title=_title(report), title_justify="left", expand=False)
    for name in ("concept", "share true / quartiles", "null", "ms", "ahead", "nearest"):
        right = name in ("null", "ms")
        table.add_column(name, justify="right" if right else "left", no_wrap=name == "concept")
    for category, checks in groupby(report.checks, key=lambda check: check.concept.category):
        table.add_row(Text(category, style="bold"))
        for check in checks:
            table.add_row(*_row(check, report.calendar))
        table.add_section()
    parts: list[RenderableType] = [table]
    warned = [(check.concept.id, warning) for check in report.checks for warning in check.warnings]
    if warned:
        parts.append(Text(f"\n{len(warned)} warning(s)", style="bold yellow"))
        parts += [Text(f"  {id}: {warning}") for id, warning in warned]
    if report.not_applicable:
        parts.append(Text(f"\n{len(report.not_applicable)} not applicable", style="bold"))
        parts += [Text(f"  {item.id}: {item.reason}") for item in report.not_applicable]
    return Group(*parts)


def _title(report: CheckReport) -> str:
    sampled = "" if report.rows == report.rows_total else f" of {report.rows_total:,}"
    leaks = f"{len(report.leaking)} look ahead" if report.leaking else "none looks ahead"
    cuts = ", ".join(written_period(cut, report.calendar) for cut in report.cuts) or "none possible"
    return (
        f"{len(report.checks)} concepts on {report.rows:,}{sampled} rows, {report.seconds:.1f} s; "
        f"{leaks} (cut at {cuts})"
    )


def _row(check: ConceptCheck, calendar: str | None) -> list[Text]:
    if check.concept.kind == "outcome":
        ahead = Text("outcome", style="dim")
    elif check.leaks_at is not None:
        ahead = Text(f"YES at {written_period(check.leaks_at, calendar)}", style="bold red")
    else:
        ahead = Text("no")
    near = Text("")
    if check.neighbour is not None and check.similarity is not None:
        style = "yellow" if check.similarity > REDUNDANT else ""
        near = Text(f"{check.neighbour} {check.similarity:.2f}", style=style)
    return [
        Text(f"  {check.concept.id}"),
        Text(_values(check)),
        Text(f"{check.nulls:.1%}"),
        Text(f"{1000 * check.seconds:.0f}"),
        ahead,
        near,
    ]


def _values(check: ConceptCheck) -> str:
    if check.prevalence is not None:
        return f"{check.prevalence:.3%}"
    if check.quartiles is not None:
        return "  ".join(f"{value:.3g}" for value in check.quartiles)
    return "-"
