"""The locked DuckDB that panel columns and concepts share: load tables, lock, run admitted expressions.

What runs is never the user's text: `parse_expression` reads it into a syntax tree, admits a named list of
constructs, and writes the SQL anew. The lock is the second wall: after `lock` the database can reach no file,
no network, no extension, no Python variable, and no setting can be changed.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from sae.errors import PanelError, UserError

from .expressions import Expression, check_expression, parse_expression
from .grammar import ExpressionError

__all__ = [
    "Expression",
    "ExpressionError",
    "check_expression",
    "connect",
    "load_table",
    "lock",
    "parse_expression",
    "quote",
]

FORMATS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
CSV_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_READING = "sample_size = -1, skip = 0, comment = ''"
"""DuckDB would leave out rows that begin with #, and those above a longer one or a second header, as a preamble."""
ISO_TIME = r"\d{4}-\d{2}(-\d{2}([ T].*)?)?"
"""Text that is read as a time; in any other order of day, month and year, which is which would be a guess."""


def quote(name: str) -> str:
    """Return a name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def connect(
    *, threads: int, memory_limit: str, spill: Path | None = None, spill_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """Open an empty in-memory database without extensions or access to Python variables; `lock` it later.

    Parameters
    ----------
    threads
        Worker threads.
    memory_limit
        As DuckDB writes it, such as `2GB`.
    spill
        Folder for what does not fit in memory; None forbids spilling, so that too large a query is an error.
    spill_limit
        Cap on that folder, such as `16GB`; None leaves DuckDB's own, nine tenths of the free disk.
    """
    config: dict[str, str | bool | int | float | list[str]] = {
        "threads": threads,
        "memory_limit": memory_limit,
        "temp_directory": "" if spill is None else str(spill),
        "allow_community_extensions": False,
        "autoload_known_extensions": False,
        "autoinstall_known_extensions": False,
        "allow_extension_repositories": "forbidden",
        "allow_persistent_secrets": False,
        "python_enable_replacements": False,
        "preserve_insertion_order": True,
    }
    if spill_limit is not None:
        config["max_temp_directory_size"] = spill_limit
    connection = duckdb.connect(config=config)
    # that of the machine would decide to which month a time belongs
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def lock(connection: duckdb.DuckDBPyConnection) -> None:
    """Take file and network access away and freeze every setting; tables loaded before stay readable."""
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def load_table(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    paths: Sequence[Path],
    *,
    ids: Sequence[str] = (),
    error: type[UserError] = PanelError,
) -> list[str]:
    """Make files readable as one table, before `lock`; return its column names.

    Parquet and Arrow files (IPC file or stream, Feather 2) are read lazily by pyarrow and handed over, so
    that the locked database has no path that it may open: DuckDB's `allowed_paths` would also allow writing
    there. CSV is read into memory, with types found from the whole of it; dates that are not all ISO 8601 stay
    text. NaN is null, as in all that follows.

    Parameters
    ----------
    connection
        From `connect`, not locked yet.
    name
        The table's name in SQL.
    paths
        One or many files of one format and one set of columns; rows follow the order given.
    ids
        Columns that are text in CSV, whatever they look like: 1.10 is not 1.1, and 007 not 7.
    error
        The class to raise.

    Raises
    ------
    UserError
        A file is missing, of unknown or mixed format, unreadable, or has other columns than the first; or two columns
        differ in case alone, which SQL takes for one.
    """
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise error("no such file", got=", ".join(missing) or "an empty list", do="check the path")
    formats = {_format(path) for path in paths}
    if len(formats) != 1 or None in formats:
        names = ", ".join(path.name for path in paths[:5])
        raise error("cannot tell the format", got=names, expected="all .parquet, .csv or .arrow")
    given, dates = f"{name} as given", dict[str, str]()
    try:
        if formats == {"csv"}:
            header, dates = _load_csv(connection, given, paths, ids)
        else:
            dataset = _dataset(paths, arrow=formats == {"arrow"})
            connection.register(given, dataset)
            header = dataset.schema.names
        columns = _make_view(connection, name, given, dates)
    except (duckdb.Error, OSError, ValueError, TypeError) as problem:
        raise error(f"cannot read {paths[0]}", got=_reason(problem)) from problem
    _refuse_alike(header, paths[0], error)
    return columns


def _refuse_alike(header: Sequence[str], path: Path, error: type[UserError]) -> None:
    """Refuse names that SQL takes for one: the second would be renamed, and its name would give the first."""
    alike = sorted(column for column, n in Counter(column.lower() for column in header).items() if n > 1)
    if alike:
        raise error(
            f"{path} has columns whose names are the same, or differ in case alone",
            got=", ".join(column for column in header if column.lower() in alike),
            do="rename or drop one of each",
        )


def _reason(problem: Exception) -> str:
    """Return what an error says before it turns to what might help and to the settings of DuckDB's reader."""
    lines = str(problem).strip().split("\n\n")[0].splitlines()
    return "; ".join(line for line in lines if not line.startswith("Possible "))


def _make_view(
    connection: duckdb.DuckDBPyConnection, name: str, given: str, dates: Mapping[str, str]
) -> list[str]:
    """Show a table under a name with dates of the types given and NaN as null; return its column names."""
    kinds = _kinds(connection, quote(given))
    columns = {column: quote(column) for column in kinds}
    columns |= {c: f"CAST({quote(c)} AS {kind})" for c, kind in dates.items()}
    columns |= {c: f"nullif({quote(c)}, 'nan')" for c, kind in kinds.items() if kind in ("FLOAT", "DOUBLE")}
    listed = ", ".join(f"{read} AS {quote(column)}" for column, read in columns.items())
    connection.execute(f"CREATE VIEW {quote(name)} AS SELECT {listed} FROM {quote(given)}")
    return list(kinds)


def _format(path: Path) -> str | None:
    if path.name.lower().endswith(CSV_ENDINGS):
        return "csv"
    return FORMATS.get(path.suffix.lower())


def _load_csv(
    connection: duckdb.DuckDBPyConnection, name: str, paths: Sequence[Path], ids: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Read files into a table; return its columns' names as they are written, and the types of those of dates alone.

    Those are text in the table.
    """
    header: list[str] | None = None
    for path in paths:
        reader = connection.sql(f"SELECT * FROM {_csv([path])}")
        if header is not None and reader.columns != header:
            raise ValueError(f"{path.name} has the columns {reader.columns}, {paths[0].name} has {header}")
        header = reader.columns
        if len(header) == 1 and re.search(r"[,;|\t]", header[0]):
            raise ValueError(f"{path.name}: some rows have more or fewer fields than the first line")
    kinds = _kinds(connection, f"(SELECT * FROM {_csv(paths)})")
    dates = {c: kind for c, kind in kinds.items() if c not in ids and kind.startswith(("DATE", "TIMESTAMP"))}
    text = ", ".join(f"{_literal(c)}: 'VARCHAR'" for c in kinds if c in ids or c in dates)
    options = [f"types = {{{text}}}"] if text else []
    connection.execute(f"CREATE TABLE {quote(name)} AS SELECT * FROM {_csv(paths, *options)}")
    for column in list(dates):
        # DuckDB takes 01/02/2020 for the one or the other, and 31-01-20 for a day of the year 31
        other = f"NOT regexp_full_match({quote(column)}, '{ISO_TIME}')"
        if connection.execute(f"SELECT 1 FROM {quote(name)} WHERE {other} LIMIT 1").fetchall():
            del dates[column]
    return _as_written(connection, paths[0], list(kinds)), dates


def _csv(paths: Sequence[Path], *options: str) -> str:
    """Return SQL that reads files."""
    files = ", ".join(_literal(glob.escape(str(path.resolve()))) for path in paths)
    return f"read_csv({', '.join([f'[{files}]', _READING, *options])})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _as_written(connection: duckdb.DuckDBPyConnection, path: Path, names: list[str]) -> list[str]:
    """Return the names of a CSV's columns without the numbers that DuckDB gave to those that were there already."""
    lines = connection.sql(f"SELECT * FROM {_csv([path], 'header = false', 'all_varchar = true')}")
    rows = lines.limit(1).fetchall()
    first = dict(zip(names, rows[0], strict=False)) if rows else {}
    return [
        given if (given := first.get(name)) and re.fullmatch(rf"{re.escape(given)}_\d+", name) else name
        for name in names
    ]


def _kinds(connection: duckdb.DuckDBPyConnection, source: str) -> dict[str, str]:
    """Return the type of every column of a table or query."""
    return {str(row[0]): str(row[1]) for row in connection.execute(f"DESCRIBE {source}").fetchall()}


def _dataset(paths: Sequence[Path], *, arrow: bool) -> Any:
    import pyarrow
    import pyarrow.dataset

    if arrow and any(_is_stream(path) for path in paths):
        tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all() for path in paths]
        return pyarrow.concat_tables(tables)
    files = [str(path.resolve()) for path in paths]
    source = pyarrow.dataset.dataset(files, format="ipc" if arrow else "parquet")
    for path in paths:
        found = pyarrow.dataset.dataset(str(path.resolve()), format=source.format).schema
        if found.names != source.schema.names:
            raise ValueError(f"{path.name} has {found.names}, {paths[0].name} has {source.schema.names}")
        for one, other in zip(found, source.schema, strict=True):
            if _is_text(one.type) != _is_text(other.type):
                # 00001 would become 1
                raise ValueError(f"{path.name} has {one.name} as {one.type}, {paths[0].name} as {other.type}")
    return source


def _is_text(kind: Any) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def zone_of(path: Path, name: str) -> str:
    """Return the time zone of a column of times, as the file has it; UTC where the format knows none."""
    if _format(path) == "csv":
        return "UTC"
    return (
        getattr(_dataset([path], arrow=_format(path) == "arrow").schema.field(name).type, "tz", None) or "UTC"
    )


def id_of(name: str) -> str:
    """Return SQL that gives a column's values as ids, which are text."""
    return f"CAST({quote(name)} AS VARCHAR)"


def _is_stream(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) != b"ARROW1"
