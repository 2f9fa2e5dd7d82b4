"""What the user's tables have in common: which files a path names, who a row is about, and how a column tells time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from sae.errors import PanelError

from . import sql


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and globs name, those of a glob in natural order: part-2 before part-10.

    Raises
    ------
    PanelError
        A glob names no file, or a file is named twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists() or not any(c in pattern for c in "*?["):
            found.append(path)
            continue
        matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))), key=_natural)
        if not matches:
            raise PanelError(f"no file matches {pattern}", do="check the path")
        found += matches
    twice = [str(path) for path, n in Counter(path.resolve() for path in found).items() if n > 1]
    if twice:
        raise PanelError(
            "files are named more than once", got=", ".join(twice[:5]), do="name each by one path or glob"
        )
    return found


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Return the key that sorts numbers within names by their value."""
    parts = re.split(r"([0-9]+)", str(path))
    # every second part is a number, so text meets text
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def code_ids(ids: pa.ChunkedArray) -> tuple[Int[np.ndarray, " rows"], pa.Array]:
    """Return each row's entity code, and the ids that codes count through, in order of their text."""
    names = pc.unique(ids)
    names = names.take(pc.sort_indices(names))
    return pc.index_in(ids, names).to_numpy().astype(np.int64), names


def time_expression(
    connection: duckdb.DuckDBPyConnection, table: str, name: str, period: str, *, files: Sequence[Path]
) -> str:
    """Return SQL that gives a time column's period index (month or day), or null where it cannot be read.

    Times with a zone count in that of their column in the files, which is UTC in CSV: never in that of the machine.
    Text is read only as 'YYYY-MM' or 'YYYY-MM-DD', with a time of day or without: in other orders of day, month and
    year one may be taken for the other. Integers are counts of periods as they stand.

    Raises
    ------
    PanelError
        The files differ in the column's zone, or it is none that is known; or the integers spell dates.
    """
    column = sql.quote(name)
    found = connection.execute(f"SELECT typeof({column}) FROM {sql.quote(table)} LIMIT 1").fetchall()
    kind = str(found[0][0]).upper() if found else "NULL"
    if kind.startswith(("DATE", "TIMESTAMP")):
        zoned = kind == "TIMESTAMP WITH TIME ZONE" or kind.startswith("TIMESTAMPTZ")
        at = f"timezone('UTC', {column})" if zoned else column
        if kind.endswith("_NS"):
            # cast through text: DuckDB cuts nanoseconds off towards 1970, which may be the day after
            at = f"CAST(left(CAST({at} AS VARCHAR), 26) AS TIMESTAMP)"
        zone = "UTC" if kind == "DATE" else _zone(name, files)
        if zone != "UTC":
            at = _local(connection, at, name, zone)
        date = f"CAST({at} AS DATE)"
    elif kind == "VARCHAR" or kind.startswith("ENUM"):
        text = f"trim(CAST({column} AS VARCHAR))"
        whole = f"CASE WHEN length({text}) = 7 THEN {text} || '-01' ELSE {text} END"
        date = f"CASE WHEN regexp_full_match({text}, '{sql.ISO_TIME}') THEN TRY_CAST({whole} AS DATE) END"
    else:
        whole = f"TRY_CAST({column} AS BIGINT)"
        _refuse_spelt_dates(connection, table, name, whole)
        return f"CASE WHEN {whole} = {column} THEN {whole} END"
    if period == "day":
        return f"date_diff('day', DATE '1970-01-01', {date})"
    return f"(year({date}) * 12 + month({date}) - 1)"


def _refuse_spelt_dates(connection: duckdb.DuckDBPyConnection, table: str, name: str, whole: str) -> None:
    """Refuse 202012 and 20201231: as counts of periods, 202101 would come 89 after the one."""
    forms = {
        "YYYYMM": f"{whole} BETWEEN 190001 AND 209912 AND {whole} % 100 BETWEEN 1 AND 12",
        "YYYYMMDD": f"{whole} BETWEEN 19000101 AND 20991231 AND {whole} // 100 % 100 BETWEEN 1 AND 12 "
        f"AND {whole} % 100 BETWEEN 1 AND 31",
    }
    listed = ", ".join(f"bool_and({form})" for form in forms.values())
    found = connection.execute(f"SELECT {listed}, min({whole}) FROM {sql.quote(table)}").fetchall()[0]
    for form, all_are in zip(forms, found, strict=False):
        if all_are:
            raise PanelError(
                f"the integers in {name} are dates, {form}, and would count as running numbers of periods",
                got=f"{found[-1]} and others",
                expected="dates, text 'YYYY-MM' or 'YYYY-MM-DD', or integers that count on by one a period",
                do="write them as such: a month as year * 12 + month - 1, a day as days since 1970-01-01",
            )


def written_period(index: int, period: str | None) -> str:
    """Return a period index of a time column as people write it; None = the column counts its periods itself.

    Examples
    --------
    >>> written_period(24242, "month")
    '2020-03'
    >>> written_period(18322, "day")
    '2020-03-01'
    >>> written_period(7, None)
    '7'
    """
    if period == "month":
        return f"{index // 12:04d}-{index % 12 + 1:02d}"
    return str(index) if period is None else str(np.datetime64(index, "D"))


def _zone(name: str, files: Sequence[Path]) -> str:
    """Return the zone of a column of times; files that differ would be read in that of the first."""
    zones = sorted({sql.zone_of(path, name) for path in files})
    if len(zones) > 1:
        raise PanelError(
            f"the files differ in the time zone of {name}",
            got=", ".join(zones),
            do="write all in one; a time without a zone counts as UTC",
        )
    return zones[0]


def _local(connection: duckdb.DuckDBPyConnection, utc: str, name: str, zone: str) -> str:
    """Return SQL that gives times in UTC as the clocks of a zone show them."""
    offset = re.fullmatch(r"([+-])(\d\d):?(\d\d)", zone)
    if offset:
        minutes = int(offset[1] + "1") * (60 * int(offset[2]) + int(offset[3]))
        return f"{utc} + INTERVAL '{minutes} minutes'"
    quoted = zone.replace("'", "''")
    try:
        connection.execute(f"SELECT timezone('{quoted}', TIMESTAMPTZ '1970-01-01')").fetchall()
    except duckdb.Error as error:
        raise PanelError(
            f"{name} has the time zone {zone!r}", expected="UTC, one such as Europe/Berlin, or +02:00"
        ) from error
    return f"timezone('{quoted}', timezone('UTC', {utc}))"
