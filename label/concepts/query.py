"""The SQL around admitted expressions: helpers level by level, and the windows that are used."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import duckdb

from activations_cache.sql import Expression, connect, lock, quote

from .windows import Frame

NUMBERS = ("INT", "DOUBLE", "FLOAT", "DECIMAL")


@dataclass(frozen=True)
class Helper:
    """A named expression; its level is one above the highest helper that it uses."""

    name: str
    expression: Expression
    level: int


@dataclass(frozen=True)
class Plan:
    """What a query reads: panel columns, helpers, and the frames of their windows."""

    columns: tuple[str, ...]
    helpers: tuple[Helper, ...]
    frames: Mapping[str, Frame] = field(default_factory=dict)


ROWS = "/*rows*/"
"""Where a query takes the choice of panel rows, before anything is computed."""


def select(plan: Plan, outputs: Sequence[str], *, order: bool = True) -> str:
    """Write the query over the table `panel`: `entity`, `time` and each output, by (entity, time).

    The rows that the outputs see have `t` (the time), `@age` (periods since the entity's first record, now
    included), the columns of the plan and its helpers. `ROWS` in the text is where a WHERE clause may go.
    """
    columns = "".join(f", {quote(name)}" for name in plan.columns)
    age = 'time - min(time) OVER (PARTITION BY entity) + 1 AS "@age"'
    steps = [f"level0 AS (SELECT entity, time, time AS t, {age}{columns} FROM panel {ROWS})"]
    levels = max((helper.level for helper in plan.helpers), default=0)
    for level in range(1, levels + 1):
        now = [helper for helper in plan.helpers if helper.level == level]
        added = "".join(f", {helper.expression.sql} AS {quote(helper.name)}" for helper in now)
        windows = _windows(plan, [helper.expression.sql for helper in now])
        steps.append(f"level{level} AS (SELECT *{added} FROM level{level - 1}{windows})")
    listed = "".join(f", {sql} AS c{number}" for number, sql in enumerate(outputs))
    query = f"WITH {', '.join(steps)} SELECT entity, time{listed} FROM level{levels}{_windows(plan, outputs)}"
    return query + (" ORDER BY entity, time" if order else "")


def _windows(plan: Plan, texts: Sequence[str]) -> str:
    used = [name for name in sorted(plan.frames) if any(f' OVER "{name}"' in text for text in texts)]
    return (
        f" WINDOW {', '.join(f'{quote(name)} AS {plan.frames[name].sql}' for name in used)}" if used else ""
    )


def result_type(plan: Plan, sql: str) -> str:
    """Return `bool` or `float`, or what DuckDB finds wrong with the expression over number columns."""
    columns = ", ".join(f"NULL::DOUBLE AS {quote(name)}" for name in plan.columns)
    source = f"(SELECT 0::BIGINT AS entity, 0::BIGINT AS time{', ' if columns else ''}{columns})"
    query = select(plan, [sql], order=False).replace("FROM panel ", f"FROM {source} AS panel ", 1)
    with _GUARD:
        try:
            description = _checker().execute(f"{query} LIMIT 0").description
        except duckdb.Error as error:
            return str(error).strip().split("\n")[0]
    found = str(description[-1][1]) if description else "nothing"
    if found == "BOOLEAN":
        return "bool"
    if any(word in found for word in NUMBERS) and "[" not in found:
        return "float"
    return f"its type is {found.lower()}, not a truth value or a number"


_GUARD = threading.Lock()


@functools.cache
def _checker() -> duckdb.DuckDBPyConnection:
    connection = connect(threads=1, memory_limit="64MB")
    lock(connection)
    return connection
