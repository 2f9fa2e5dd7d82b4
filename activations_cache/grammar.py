"""What an expression may consist of, node by node, and the SQL that each admitted node becomes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 48
MAX_LAG = 600
HISTORY = "w"

FUNCTIONS = {
    **dict.fromkeys(
        ("abs", "sign", "floor", "ceil", "ceiling", "exp", "sqrt", "ln", "log2", "log10"), (1, 1)
    ),
    **dict.fromkeys(
        ("isfinite", "isnan", "isinf", "lower", "upper", "trim", "length", "year", "month"), (1, 1)
    ),
    **dict.fromkeys(("nullif", "power", "pow", "left", "right", "starts_with"), (2, 2)),
    **dict.fromkeys(("greatest", "least"), (2, 32)),
    **dict.fromkeys(("round", "log"), (1, 2)),
    **dict.fromkeys(("if", "date_diff"), (3, 3)),
}
WINDOW_FUNCTIONS = {
    **dict.fromkeys(
        ("max", "min", "sum", "avg", "mean", "median", "bool_and", "bool_or", "count_if"), (1, 1)
    ),
    **dict.fromkeys(("stddev", "stddev_samp", "stddev_pop", "variance", "var_samp", "var_pop"), (1, 1)),
    **dict.fromkeys(("regr_slope", "regr_intercept", "regr_r2", "corr", "covar_samp", "covar_pop"), (2, 2)),
    **dict.fromkeys(("first_value", "last_value"), (1, 1)),
    "count": (0, 1),
    "count_star": (0, 0),
    "row_number": (0, 0),
    "lag": (1, 2),
    "lead": (1, 2),
}
INFIX = {"+", "-", "*", "/", "//", "%", "**", "^"}
COMPARISONS = {
    "COMPARE_EQUAL": "=",
    "COMPARE_NOTEQUAL": "<>",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
    "COMPARE_DISTINCT_FROM": "IS DISTINCT FROM",
    "COMPARE_NOT_DISTINCT_FROM": "IS NOT DISTINCT FROM",
}
TYPES = {
    "BOOLEAN",
    "BOOL",
    "INTEGER",
    "INT",
    "BIGINT",
    "SMALLINT",
    "FLOAT",
    "REAL",
    "DOUBLE",
    "DATE",
    "VARCHAR",
}
NUMBER = r"-?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?"
REFUSED = {
    "SUBQUERY": "subqueries are not allowed",
    "STAR": "`*` is not allowed; name the column",
    "LAMBDA": "lambdas and `->` are not allowed",
    "PARAMETER": "parameters (`?`, `$name`) are not allowed",
    "POSITIONAL_REFERENCE": "positional references (`#1`) are not allowed",
    "COLLATE": "COLLATE is not allowed",
    "DEFAULT": "DEFAULT is not allowed",
}


class ExpressionError(ValueError):
    """An expression is not admitted; the message is the reason, without the expression or where it stands."""


@dataclass
class Writer:
    """Writes SQL from admitted nodes and notes what they use."""

    columns: Mapping[str, str]
    windows: Mapping[str, str]
    ahead: bool
    used_columns: set[str] = field(default_factory=set)
    used_windows: set[str] = field(default_factory=set)
    lags: set[int] = field(default_factory=set)
    leads: set[int] = field(default_factory=set)
    depth: int = 0
    in_window: bool = False

    def write(self, node: Mapping[str, Any]) -> str:
        """Return the node's SQL, or raise ExpressionError if it is not admitted."""
        kind = str(node.get("class"))
        if node.get("alias"):
            raise ExpressionError("names (`AS`, `:=`) are not allowed")
        method = getattr(self, f"_{kind.lower()}", None) if kind in ADMITTED else None
        if method is None:
            raise ExpressionError(REFUSED.get(kind, f"{kind.lower()} is not allowed"))
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"it is nested more than {MAX_DEPTH} deep; use a helper")
        sql: str = method(node)
        self.depth -= 1
        return sql

    def _constant(self, node: Mapping[str, Any]) -> str:
        literal = node.get("literal", {})
        kind, text = literal.get("kind"), str(literal.get("text", ""))
        if kind == "NULL_LITERAL":
            return "NULL"
        if kind == "BOOLEAN" and text in ("true", "false"):
            return text
        if kind in ("INTEGER", "NUMERIC") and re.fullmatch(NUMBER, text, re.ASCII):
            return f"({text})" if text.startswith("-") else text
        if kind == "STRING":
            return "'" + text.replace("'", "''") + "'"
        raise ExpressionError(
            f"the constant {text or kind} is not allowed; write a number, a text, true, false or null"
        )

    def _column_ref(self, node: Mapping[str, Any]) -> str:
        names = node["column_names"]
        found = self.columns.get(names[0].lower()) if len(names) == 1 else None
        if found is None:
            raise ExpressionError(
                f"unknown column {'.'.join(names)!r}{_near(names[-1], self.columns.values())}"
            )
        self.used_columns.add(found)
        return '"' + found.replace('"', '""') + '"'

    def _comparison(self, node: Mapping[str, Any]) -> str:
        sign = COMPARISONS.get(node["type"])
        if sign is None:
            raise ExpressionError(f"{node['type']} is not allowed")
        return f"({self.write(node['left'])} {sign} {self.write(node['right'])})"

    def _conjunction(self, node: Mapping[str, Any]) -> str:
        word = {"CONJUNCTION_AND": " AND ", "CONJUNCTION_OR": " OR "}[node["type"]]
        return "(" + word.join(self.write(child) for child in node["children"]) + ")"

    def _operator(self, node: Mapping[str, Any]) -> str:
        kind = node["type"]
        children = [self.write(child) for child in node["children"]]
        if kind == "OPERATOR_NOT":
            return f"(NOT {children[0]})"
        if kind in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
            return f"({children[0]} {kind.removeprefix('OPERATOR_').replace('_', ' ')})"
        if kind == "OPERATOR_COALESCE":
            return f"coalesce({', '.join(children)})"
        if kind in ("COMPARE_IN", "COMPARE_NOT_IN"):
            word = "IN" if kind == "COMPARE_IN" else "NOT IN"
            return f"({children[0]} {word} ({', '.join(children[1:])}))"
        raise ExpressionError(f"{kind} is not allowed")

    def _between(self, node: Mapping[str, Any]) -> str:
        value, low, high = (self.write(node[key]) for key in ("input", "lower", "upper"))
        return f"({value} BETWEEN {low} AND {high})"

    def _case(self, node: Mapping[str, Any]) -> str:
        checks = [
            f"WHEN {self.write(c['when_expr'])} THEN {self.write(c['then_expr'])}"
            for c in node["case_checks"]
        ]
        return f"CASE {' '.join(checks)} ELSE {self.write(node['else_expr'])} END"

    def _cast(self, node: Mapping[str, Any]) -> str:
        target = node["type_expr"]
        name = str(target.get("type_name", "")).upper()
        if (
            name not in TYPES
            or target.get("children")
            or target["qualified_name"]["path"] != [target["type_name"]]
        ):
            raise ExpressionError(
                f"a cast to {name or 'that type'} is not allowed; known: {', '.join(sorted(TYPES))}"
            )
        return f"TRY_CAST({self.write(node['child'])} AS {name})"

    def _function(self, node: Mapping[str, Any]) -> str:
        name = _plain_name(node)
        if node.get("distinct") or node.get("filter") or node.get("order_bys", {}).get("orders"):
            raise ExpressionError(f"{name}: DISTINCT, FILTER and ORDER BY need a window (OVER)")
        if name in WINDOW_FUNCTIONS and name not in FUNCTIONS:
            raise ExpressionError(f"{name} needs a window: {name}(...) OVER {HISTORY}")
        arguments = self._arguments(node)
        if node.get("is_operator") and name in INFIX:
            return _infix(name, arguments)
        if node.get("is_operator") or name not in FUNCTIONS:
            raise ExpressionError(f"the function {name!r} is not allowed{_near(name, FUNCTIONS)}")
        _check_count(name, len(arguments), FUNCTIONS[name])
        if name in ("ln", "log", "log2", "log10"):
            arguments[-1] = f"nullif(greatest({arguments[-1]}, 0), 0)"
        return f"{name}({', '.join(arguments)})"

    def _window(self, node: Mapping[str, Any]) -> str:
        name, window = _plain_name(node), self._named_window(node)
        if name not in WINDOW_FUNCTIONS or (name == "lead" and not self.ahead):
            looks_ahead = "looks ahead; only `kind: outcome` may"
            reason = (
                looks_ahead
                if name == "lead"
                else f"is not allowed over a window{_near(name, WINDOW_FUNCTIONS)}"
            )
            raise ExpressionError(f"the function {name!r} {reason}")
        if name == "row_number" and window != HISTORY:
            raise ExpressionError(f"row_number counts an entity's rows up to now: write it OVER {HISTORY}")
        if self.in_window:
            raise ExpressionError("a window inside a window; make the inner one a helper")
        self.in_window = True
        if name in ("lag", "lead"):
            sql = self._shift(node, name, window)
        else:
            self.used_windows.add(window)
            arguments = self._arguments(node)
            _check_count(name, len(arguments), WINDOW_FUNCTIONS[name])
            nulls = " IGNORE NULLS" if node.get("ignore_nulls") else ""
            if nulls and name not in ("first_value", "last_value"):
                raise ExpressionError(f"IGNORE NULLS has no meaning for {name}")
            inside = "*" if name == "count" and not arguments else ", ".join(arguments) + nulls
            chosen = f" FILTER (WHERE {self.write(node['filter_expr'])})" if node.get("filter_expr") else ""
            sql = f'{name}({inside}){chosen} OVER "{window}"'
        self.in_window = False
        return sql

    def _shift(self, node: Mapping[str, Any], name: str, window: str) -> str:
        arguments = node.get("arguments", [])
        _check_count(name, len(arguments), WINDOW_FUNCTIONS[name])
        literal = arguments[1]["expression"].get("literal", {}) if len(arguments) == 2 else {"text": "1"}
        text = str(literal.get("text", ""))
        if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_LAG:
            raise ExpressionError(f"the offset of {name} must be a whole number from 1 to {MAX_LAG}")
        if window != HISTORY or node.get("filter_expr") or node.get("ignore_nulls"):
            raise ExpressionError(
                f"{name} reads one period exactly: write {name}(x, n) OVER {HISTORY}, no more"
            )
        (self.lags if name == "lag" else self.leads).add(int(text))
        return f'max({self.write(arguments[0]["expression"])}) OVER "{name}_{int(text)}"'

    def _named_window(self, node: Mapping[str, Any]) -> str:
        if not self.windows:
            raise ExpressionError("window functions (OVER) are not allowed here")
        parts = node.get("partitions", [])
        marker = parts[0].get("column_names", [""])[0] if len(parts) == 1 else ""
        plain = node.get("start") == "UNBOUNDED_PRECEDING" and node.get("end") == "CURRENT_ROW_RANGE"
        extra = [key for key in ("orders", "arg_orders", "start_expr", "end_expr") if node.get(key)]
        if (
            not plain
            or extra
            or node.get("exclude_clause") != "NO_OTHER"
            or marker[1:].lower() not in self.windows
        ):
            raise ExpressionError(
                "write OVER and the name of a declared window; no frame, PARTITION BY or ORDER BY"
            )
        if node.get("distinct"):
            raise ExpressionError("DISTINCT is not allowed over a window")
        return self.windows[marker[1:].lower()]

    def _arguments(self, node: Mapping[str, Any]) -> list[str]:
        return [self.write(argument["expression"]) for argument in node.get("arguments", [])]


ADMITTED = {"CONSTANT", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "OPERATOR", "BETWEEN", "CASE", "CAST"}
ADMITTED |= {"FUNCTION", "WINDOW"}


def _infix(name: str, arguments: list[str]) -> str:
    if len(arguments) == 1 and name in "+-":
        return f"({name} {arguments[0]})"
    _check_count(name, len(arguments), (2, 2))
    right = f"nullif({arguments[1]}, 0)" if name in ("/", "//", "%") else arguments[1]
    return f"({arguments[0]} {name} {right})"


def _plain_name(node: Mapping[str, Any]) -> str:
    path = node.get("qualified_name", {}).get("path", [])
    if len(path) != 1 or node.get("schema") or node.get("catalog"):
        raise ExpressionError(f"the function {'.'.join(path)!r} is not allowed")
    return str(path[0]).lower()


def _check_count(name: str, count: int, limits: tuple[int, int]) -> None:
    low, high = limits
    if not low <= count <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        raise ExpressionError(f"{name} takes {wanted} argument(s), not {count}")


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
