"""The frame of every page: one file that carries its style and script, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from .html import Child, Markup, el, join

WARNING = (
    "A label explains a direction in a network, not a customer decision. It is not an adverse-action "
    "reason unless the reason is derived from factors actually scored and the attribution from input to "
    "feature to score is tested."
)


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _policy() -> str:
    """Return the content policy: nothing is loaded, and only this style and this script count."""
    hashes = {
        name: base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode()
        for name in ("report.css", "report.js")
    }
    return (
        f"default-src 'none'; style-src 'sha256-{hashes['report.css']}'; script-src "
        f"'sha256-{hashes['report.js']}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def page(title: str, navigation: Child, *content: Child, footer: Child = None) -> str:
    """Return a whole document.

    Parameters
    ----------
    title
        Of the window.
    navigation
        What stands in the bar on top.
    content
        The page, from its h1 on.
    footer
        The last line; the warning that every page carries is added.
    """
    head = [
        el("meta", {"charset": "utf-8"}),
        el("meta", {"http-equiv": "Content-Security-Policy", "content": _policy()}),
        el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("meta", {"name": "referrer", "content": "no-referrer"}),
        Markup('<link rel="icon" href="data:,"/>'),
        el("title", None, title),
        Markup(f"<style>{_asset('report.css')}</style>"),
    ]
    sprite = Markup(
        '<svg class="sprite" aria-hidden="true"><pattern id="hatch" width="5" height="5" '
        'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line x1="0" y1="0" x2="0" y2="5" class="hatch"/></pattern>'
        '<marker id="dot" markerWidth="4" markerHeight="4" refX="2" refY="2" markerUnits="userSpaceOnUse">'
        '<circle cx="2" cy="2" r="1.6" class="point"/></marker></svg>'
    )
    body = [
        el("a", {"class": "skip", "href": "#main"}, "Skip to the content"),
        sprite,
        el("nav", {"aria-label": "pages"}, el("div", None, navigation)),
        el("main", {"id": "main"}, *content),
        el("footer", None, el("p", None, footer, " " if footer else None, WARNING)),
        Markup(f"<script>{_asset('report.js')}</script>"),
    ]
    root = el("html", {"lang": "en"}, el("head", None, *head), el("body", None, *body))
    return f"<!doctype html>\n{root}\n"


def section(anchor: str, title: str, *content: Child) -> Markup:
    """Return a titled section that can be linked to."""
    return el("section", {"id": anchor}, el("h2", None, title), *content)


def scroll(label: str, content: Child) -> Markup:
    """Return content that scrolls sideways where it is too wide, with the keyboard too."""
    return el("div", {"class": "scroll", "tabindex": 0, "role": "region", "aria-label": label}, content)


def head_cell(title: Child, *, number: bool = False, sort: bool = False, hint: str | None = None) -> Markup:
    """Return the head of a column."""
    kind = {"scope": "col", "class": "n" if number else None, "title": hint}
    return el("th", kind, el("button", {"type": "button"}, title) if sort else title)


def facts(items: list[tuple[Child, Child]], kind: str | None = None) -> Markup:
    """Return names with their values."""
    return el("dl", {"class": kind}, *(join([el("dt", None, k), el("dd", None, v)]) for k, v in items))
