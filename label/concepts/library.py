"""Concepts, what is said of them, and which of them a panel can have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import Field

from activations_cache.sql import Expression
from sae.config import Config

from .query import Helper
from .windows import Frame, Window

NAME = r"[a-z][a-z0-9_]{0,63}"
ANY = "any"

Kind = Literal["point", "window", "trend", "event", "since", "outcome"]
Type = Literal["bool", "float"]
Risk = Literal["up", "down", "mixed"]


class ConceptInfo(Config):
    """What is said about a concept, however its values come about."""

    id: str = Field(pattern=f"^{NAME}$")
    """Its name in files and tables."""
    text: str = Field(min_length=1, max_length=300)
    """The definition in an expert's words."""
    kind: Kind
    """What it states: a point in time, a window, a trend, an event, time since an event, an outcome."""
    type: Type
    """`bool` or `float`."""
    risk: Risk = "mixed"
    """Whether default usually becomes likelier as the value rises: up, down, or mixed."""
    category: str = Field(default="other", min_length=1, max_length=60)
    """The heading it is listed under."""
    regb_reason: str | None = Field(default=None, max_length=200)
    """The adverse-action reason that it maps to, where one does clearly."""
    owner: str | None = None
    """Who answers for the definition."""
    source: str | None = None
    """Where the definition comes from."""


class ConceptSpec(ConceptInfo):
    """A concept as a file defines it."""

    type: Type | None = None  # type: ignore[assignment]
    """`bool` or `float`; found from the expression if absent, and checked against it if given."""
    expr: str
    """One scalar expression."""
    products: tuple[str, ...] = ()
    """The products that it makes sense for; `any` for all; absent = the file's."""
    min_history: int | None = Field(default=None, ge=1, le=600)
    """Periods of history, now included, from which it has a value; absent = its longest window."""


class Concept(ConceptInfo):
    """A concept that was admitted and can be computed."""

    expr: str
    products: tuple[str, ...]
    min_history: int | None
    file: str
    expression: Expression
    helpers: tuple[Helper, ...]
    """The helpers that it needs, each after those it needs itself."""
    frames: dict[str, Frame]
    """The windows of the expression and of its helpers."""
    columns: frozenset[str]
    """The panel columns that it reads, through helpers too."""
    history: int
    """Periods of history, now included, before which it is null."""
    ahead: int
    """Periods it looks ahead: 0 unless `kind: outcome`."""


class ConceptFile(Config):
    """One YAML file; its concepts are validated one by one, so that each problem names its concept."""

    version: Literal[1]
    """The version of this format."""
    products: tuple[str, ...] = ()
    """What concepts without `products` of their own are meant for."""
    columns: dict[str, str]
    """Canonical panel columns and what they hold; all are numbers."""
    windows: dict[str, Window] = Field(default_factory=dict)
    """Windows beyond the standard ones."""
    helpers: dict[str, str] = Field(default_factory=dict)
    """Named expressions that concepts and later helpers use as columns."""
    concepts: list[Any] = Field(min_length=1, max_length=1000)
    """The concepts."""


class NotApplicable(NamedTuple):
    """A concept that cannot or should not be computed on a panel, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class ConceptLibrary:
    """The concepts of one or several files, in file order."""

    concepts: tuple[Concept, ...]

    def __getitem__(self, id: str) -> Concept:
        found = next((concept for concept in self.concepts if concept.id == id), None)
        if found is None:
            raise KeyError(id)
        return found

    def applicable(self, product: str, columns: Collection[str]) -> tuple[list[Concept], list[NotApplicable]]:
        """Divide the concepts by whether a panel of this product and these columns can have them."""
        fit: list[Concept] = []
        unfit: list[NotApplicable] = []
        for concept in self.concepts:
            missing = sorted(concept.columns - set(columns))
            if ANY not in concept.products and product not in concept.products:
                reason = f"meant for {', '.join(concept.products)}; the panel is {product}"
                unfit.append(NotApplicable(concept.id, reason))
            elif missing:
                unfit.append(NotApplicable(concept.id, f"the panel has no column {', '.join(missing)}"))
            else:
                fit.append(concept)
        return fit, unfit
