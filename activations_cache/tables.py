"""What the user's tables have in common: which files a path names, and how a column tells time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb

from sae.errors import PanelError

from . import sql


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and globs name, sorted within each glob; PanelError where one names none."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists() or not any(c in pattern for c in "*?["):
            found.append(path)
            continue
        matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise PanelError(f"no file matches {pattern}", do="check the path")
        found += matches
    return found


def time_expression(
    connection: duckdb.DuckDBPyConnection, table: str, name: str, period: str, *, files: Sequence[Path]
) -> str:
    """Return SQL that gives a time column's period index (month or day), or null where it cannot be read.

    Times with a zone count in that of their column in the files, which is UTC in CSV: never in that of the machine.
    """
    column = sql.quote(name)
    found = connection.execute(f"SELECT typeof({column}) FROM {sql.quote(table)} LIMIT 1").fetchall()
    kind = str(found[0][0]).upper() if found else "NULL"
    if kind == "TIMESTAMP WITH TIME ZONE":
        zone = sql.zone_of(files[0], name).replace("'", "''")
        date = f"CAST(timezone('{zone}', {column}) AS DATE)"
    elif kind.startswith(("DATE", "TIMESTAMP")):
        date = f"CAST({column} AS DATE)"
    elif kind == "VARCHAR":
        text = f"trim({column})"
        date = f"CASE WHEN length({text}) = 7 THEN TRY_CAST({text} || '-01' AS DATE) ELSE TRY_CAST({text} AS DATE) END"
    else:
        whole = f"TRY_CAST({column} AS BIGINT)"
        return f"CASE WHEN {whole} = {column} THEN {whole} END"
    if period == "day":
        return f"date_diff('day', DATE '1970-01-01', {date})"
    return f"(year({date}) * 12 + month({date}) - 1)"
