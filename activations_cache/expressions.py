"""One DuckDB scalar expression, read into a syntax tree, admitted node by node, and written anew as SQL.

The text is parsed by `json_serialize_sql` (nothing is run), every node must be on a list, and what is
executed is rendered from the admitted nodes, every operator in parentheses. Nothing of the original text
survives: no comment, no second statement, no name that was not declared.

Three constructs mean something more careful than in plain SQL:

- `lag(x, n) OVER w` is the value exactly n periods ago, null where that period has no row (not n rows ago);
- `a / b`, `a // b` and `a % b` are null where b is 0, and logarithms are null outside their domain;
- `CAST` is `TRY_CAST`: null where the value does not fit.
"""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from sae.errors import PanelError, UserError

from .grammar import ExpressionError, Writer

MAX_LENGTH = 2000
MAX_PARENTHESES = 32


@dataclass(frozen=True)
class Expression:
    """An admitted expression.

    Attributes
    ----------
    text
        What was written.
    sql
        What is run; it names declared columns, named windows, and the generated windows `lag_n` and
        `lead_n` (the one row exactly n periods before or after), which whoever writes the WINDOW clause
        defines.
    columns, windows
        The declared names that it uses.
    lags, leads
        The offsets n of the generated windows that it uses.
    """

    text: str
    sql: str
    columns: frozenset[str]
    windows: frozenset[str] = frozenset()
    lags: frozenset[int] = frozenset()
    leads: frozenset[int] = frozenset()


def check_expression(
    text: str,
    columns: Collection[str],
    *,
    windows: Collection[str] = (),
    where: str = "expression",
    error: type[UserError] = PanelError,
) -> Expression:
    """Parse an expression as `parse_expression` does and raise the caller's kind of error.

    Raises
    ------
    UserError
        Of class `error`, naming `where`, the text and the reason.
    """
    try:
        return parse_expression(text, columns, windows=windows)
    except ExpressionError as problem:
        shown = text if len(text) <= 200 else text[:200] + "..."
        raise error(f"{where}: {problem}", got=ascii(shown)) from problem


def parse_expression(
    text: str, columns: Collection[str], *, windows: Collection[str] = (), ahead: bool = False
) -> Expression:
    """Admit a scalar expression and write its SQL, or say why not.

    Parameters
    ----------
    text
        One DuckDB scalar expression.
    columns
        The columns it may name, compared without case as SQL does.
    windows
        The windows it may name after OVER; `lag` needs `w` among them. Empty: no window functions.
    ahead
        Whether `lead` is allowed, for outcomes.

    Raises
    ------
    ExpressionError
        It is too long, too deep, not one expression, or holds a construct or a name that is not on the lists.

    Examples
    --------
    >>> parse_expression("greatest(pay_status, 0)", ["pay_status"]).sql
    'greatest("pay_status", 0)'
    >>> sorted(parse_expression("bkt > lag(bkt, 2) OVER w", ["bkt"], windows=["w"]).lags)
    [2]
    """
    _check_text(text)
    try:
        writer = Writer(
            columns={name.lower(): name for name in columns},
            windows={name.lower(): name for name in windows},
            ahead=ahead,
        )
        sql = writer.write(_tree(text, writer.windows))
    except RecursionError as problem:
        raise ExpressionError("it is nested too deeply") from problem
    return Expression(
        text=text,
        sql=sql,
        columns=frozenset(writer.used_columns),
        windows=frozenset(writer.used_windows),
        lags=frozenset(writer.lags),
        leads=frozenset(writer.leads),
    )


def _check_text(text: str) -> None:
    if not text.strip():
        raise ExpressionError("it is empty")
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"it is {len(text)} characters long, the limit is {MAX_LENGTH}; use a helper")
    if "--" in text or "/*" in text:
        raise ExpressionError("comments (`--`, `/*`) are not allowed")
    for character in text:
        if character not in "\n\t " and unicodedata.category(character)[0] in "CZ":
            raise ExpressionError(f"the character U+{ord(character):04X} is not allowed")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_PARENTHESES:
        raise ExpressionError(
            f"brackets are nested {deepest} deep, the limit is {MAX_PARENTHESES}; use a helper"
        )


_PARSER = duckdb.connect(
    config={
        "threads": 1,
        "memory_limit": "64MB",
        "enable_external_access": False,
        "autoload_known_extensions": False,
        "autoinstall_known_extensions": False,
        "python_enable_replacements": False,
        "lock_configuration": True,
    }
)
_PARSER_LOCK = threading.Lock()


def _tree(text: str, windows: Mapping[str, str]) -> dict[str, Any]:
    """Return the syntax tree of the one expression; each window is parsed as PARTITION BY its own marker."""
    markers = ", ".join(f'"{name}" AS (PARTITION BY "@{name}")' for name in sorted(windows))
    query = f"SELECT (\n{text}\n) FROM panel" + (f" WINDOW {markers}" if markers else "")
    with _PARSER_LOCK:
        answer = _PARSER.execute(
            "SELECT json_serialize_sql(?::VARCHAR, skip_null := true, skip_empty := true)", [query]
        ).fetchone()
    parsed: dict[str, Any] = (
        json.loads(answer[0]) if answer else {"error": True, "error_message": "no answer"}
    )
    if parsed["error"]:
        raise ExpressionError(_reason(str(parsed.get("error_message", ""))))
    statements = parsed["statements"]
    node = statements[0]["node"] if len(statements) == 1 else {}
    shape = {key: value for key, value in node.items() if key not in ("select_list", "from_table")}
    if shape != _SHAPE or node["from_table"].get("table_name") != "panel" or len(node["select_list"]) != 1:
        raise ExpressionError("it is not one scalar expression")
    expression: dict[str, Any] = node["select_list"][0]
    return expression


_SHAPE = {"type": "SELECT_NODE", "cte_map": {}, "aggregate_handling": "STANDARD_HANDLING"}


def _reason(message: str) -> str:
    window = re.fullmatch(r'window "(.*)" does not exist', message)
    return (
        f"unknown window {window[1]!r}"
        if window
        else f"it cannot be parsed: {message.strip().splitlines()[0]}"
    )
