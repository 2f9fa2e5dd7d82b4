"""The concept language: YAML files of columns, named windows, helpers and concepts, read into a library.

Every `expr` is one DuckDB scalar expression over the file's columns, helpers and windows, with `t` as the
time column; the program writes SELECT, FROM and WINDOW. A file is complete in itself: it declares every
column it names.

Two rules go beyond SQL. `lag(x, n)` is the value exactly n periods ago, else null. And a concept that
gathers a window is null until the entity's first record in the panel is so far back that the longest window
among its own and its helpers' is full, unless `min_history` gives another number of periods (now included).
A window that begins at the start has no length and asks for nothing, nor does `lag`, which is null by
itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from activations_cache.sql import Expression, ExpressionError, parse_expression
from sae.config import Config
from sae.errors import ConceptError

from .library import NAME, Concept, ConceptFile, ConceptLibrary, ConceptSpec
from .query import Helper, Plan, result_type
from .safety import read_yaml
from .windows import AHEAD, STANDARD, Frame, generated

TIME = "t"
RESERVED = {"entity", "time", TIME, "split", "inner", "outcome", "position"}

ConfigT = TypeVar("ConfigT", bound=Config)


def load_concepts(paths: Sequence[Path]) -> ConceptLibrary:
    """Read, admit and type-check every concept of every file.

    Parameters
    ----------
    paths
        YAML files; order is kept.

    Raises
    ------
    ConceptError
        One error that lists every problem of every file with file and concept, duplicates across files
        included.
    """
    problems: list[str] = []
    concepts: list[Concept] = []
    for path in paths:
        try:
            reader = _Reader(path)
            concepts += reader.read()
            problems += [f"{path}: {problem}" for problem in reader.problems]
        except ConceptError as error:
            problems.append(str(error))
    problems += _clashes(concepts)
    if not paths:
        problems.append("`concepts.paths` is empty")
    if problems:
        raise ConceptError(f"{len(problems)} problem(s) in the concepts\n  " + "\n  ".join(problems))
    return ConceptLibrary(tuple(concepts))


def _clashes(concepts: Sequence[Concept]) -> list[str]:
    problems: list[str] = []
    files: dict[str, str] = {}
    helpers: dict[str, tuple[str, str]] = {}
    frames: dict[str, tuple[Frame, str]] = {}
    columns = {name: concept.file for concept in concepts for name in sorted(concept.columns)}
    for concept in concepts:
        if concept.id in files:
            problems.append(f"{concept.file}: concept {concept.id}: defined before in {files[concept.id]}")
        files.setdefault(concept.id, concept.file)
        for helper in concept.helpers:
            text, file = helpers.setdefault(helper.name, (helper.expression.sql, concept.file))
            if text != helper.expression.sql:
                problems.append(f"{concept.file}: helper {helper.name}: defined differently in {file}")
            if helper.name in columns:
                problems.append(
                    f"{concept.file}: helper {helper.name}: a column that {columns[helper.name]} reads has this name"
                )
        for name, frame in concept.frames.items():
            first, file = frames.setdefault(name, (frame, concept.file))
            if first != frame:
                problems.append(f"{concept.file}: window {name}: defined differently in {file}")
    return list(dict.fromkeys(problems))


class _Reader:
    """Reads one file and gathers its problems."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.frames: dict[str, Frame] = dict(STANDARD)
        self.helpers: dict[str, Helper] = {}
        self.columns: list[str] = []

    def read(self) -> list[Concept]:
        """Return the concepts that are right; `problems` holds what is wrong with the others."""
        tree = read_yaml(self.path)
        file = self._validate(ConceptFile, tree, where="")
        if file is None:
            return []
        self._names(file)
        self._helpers(file.helpers)
        concepts = [self._concept(item, number, file) for number, item in enumerate(file.concepts, 1)]
        return [concept for concept in concepts if concept is not None]

    def _validate(self, cls: type[ConfigT], tree: Any, *, where: str) -> ConfigT | None:
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                place = ".".join(str(part) for part in problem["loc"]) or "the file"
                got = problem["input"]
                shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | None) else ""
                self.problems.append(f"{where}{place}: {problem['msg']}{shown}")
            return None

    def _names(self, file: ConceptFile) -> None:
        for what, names in (("column", file.columns), ("window", file.windows), ("helper", file.helpers)):
            for name in names:
                if not re.fullmatch(NAME, name):
                    self.problems.append(f"{what} {name!r}: a name is {NAME}")
                elif what != "window" and (name in RESERVED or name.startswith("audit_")):
                    self.problems.append(f"{what} {name}: the name is reserved; concepts never read it")
                elif what == "window" and (
                    name in STANDARD or name in AHEAD or name.startswith(("lag_", "lead_"))
                ):
                    self.problems.append(f"window {name}: the name is taken")
        both = sorted(set(file.columns) & set(file.helpers))
        self.problems += [f"helper {name}: a column has this name" for name in both]
        self.columns = list(file.columns)
        self.frames |= {
            name: window.frame for name, window in file.windows.items() if name not in self.frames
        }

    def _helpers(self, texts: dict[str, str]) -> None:
        parsed: dict[str, Expression] = {}
        names = [TIME, *self.columns, *texts]
        for name, text in texts.items():
            try:
                parsed[name] = parse_expression(text, names, windows=self.frames)
            except ExpressionError as error:
                self.problems.append(f"helper {name}: {error}")
        waiting = dict(parsed)
        while waiting:
            ready = [name for name, e in waiting.items() if not (e.columns & set(texts)) - set(self.helpers)]
            for name in ready:
                self._helper(name, waiting.pop(name))
            if not ready:
                circle = [name for name, e in waiting.items() if e.columns & set(waiting)]
                self.problems += [
                    f"helper {name}: it needs itself, or a helper that is wrong" for name in circle
                ]
                return

    def _helper(self, name: str, expression: Expression) -> None:
        inner = [self.helpers[column] for column in sorted(expression.columns) if column in self.helpers]
        helper = Helper(name, expression, level=1 + max((h.level for h in inner), default=0))
        plan = self._plan(expression, [*_closure(inner, self.helpers), helper], self.frames)
        kind = result_type(plan, f'"{name}"')
        if kind not in ("bool", "float"):
            self.problems.append(f"helper {name}: {kind}")
        self.helpers[name] = helper

    def _plan(self, expression: Expression, helpers: Sequence[Helper], frames: dict[str, Frame]) -> Plan:
        used = frozenset().union(expression.columns, *(helper.expression.columns for helper in helpers))
        shifts = [
            generated(e.lags, e.leads) for e in (expression, *(helper.expression for helper in helpers))
        ]
        all_frames = frames | {name: frame for shift in shifts for name, frame in shift.items()}
        return Plan(tuple(sorted(used & set(self.columns))), tuple(helpers), all_frames)

    def _concept(self, item: Any, number: int, file: ConceptFile) -> Concept | None:
        name = item.get("id") if isinstance(item, dict) else None
        where = f"concept {name if isinstance(name, str) else f'number {number}'}: "
        spec = self._validate(ConceptSpec, item, where=where)
        if spec is None:
            return None
        if spec.id in RESERVED:
            self.problems.append(f"{where}the id is reserved")
        products = spec.products or file.products
        if not products:
            self.problems.append(f"{where}no products; name them, or `[any]`, here or for the file")
        outcome = spec.kind == "outcome"
        frames = self.frames | (AHEAD if outcome else {})
        names = [TIME, *self.columns, *file.helpers]
        try:
            expression = parse_expression(spec.expr, names, windows=frames, ahead=outcome)
        except ExpressionError as error:
            reason = str(error)
            if any(reason.startswith(f"unknown window {window!r}") for window in AHEAD):
                reason = f"{reason}: looking ahead is for `kind: outcome` only"
            self.problems.append(f"{where}{reason}")
            return None
        inner = [self.helpers[column] for column in sorted(expression.columns) if column in self.helpers]
        if len(inner) < len(expression.columns & set(file.helpers)):
            return None
        return self._compile(spec, expression, _closure(inner, self.helpers), frames, products, where)

    def _compile(
        self,
        spec: ConceptSpec,
        expression: Expression,
        helpers: list[Helper],
        frames: dict[str, Frame],
        products: tuple[str, ...],
        where: str,
    ) -> Concept | None:
        plan = self._plan(expression, helpers, frames)
        kind = result_type(plan, expression.sql)
        if kind not in ("bool", "float") or spec.type not in (None, kind):
            self.problems.append(
                f"{where}{kind if kind not in ('bool', 'float') else f'its type is {kind}, not {spec.type}'}"
            )
            return None
        windows = expression.windows.union(*(helper.expression.windows for helper in helpers))
        used = {name: frame for name, frame in plan.frames.items() if name in windows or name not in frames}
        return Concept(
            **(spec.model_dump() | {"type": kind, "products": products}),
            file=str(self.path),
            expression=expression,
            helpers=tuple(helpers),
            frames=used,
            columns=frozenset(plan.columns),
            history=spec.min_history or max((used[name].history for name in windows), default=1),
            ahead=max((used[name].ahead for name in used), default=0),
        )


def _closure(helpers: Sequence[Helper], known: dict[str, Helper]) -> list[Helper]:
    """Return the helpers and all that they need, each after what it needs."""
    found: dict[str, Helper] = {}
    for helper in helpers:
        inner = [known[column] for column in sorted(helper.expression.columns) if column in known]
        found |= {item.name: item for item in _closure(inner, known)} | {helper.name: helper}
    return sorted(found.values(), key=lambda helper: (helper.level, helper.name))
