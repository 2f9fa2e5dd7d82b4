"""Ready-made concept values: a user's table, brought into the layout that `evaluate_concepts` writes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from activations_cache.sql import connect, load_table, lock, quote
from sae.errors import ConceptError

from .language import RESERVED
from .library import NAME, ConceptInfo
from .safety import read_yaml

_WHOLE = r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?"
_NUMBER = rf"{_WHOLE}|FLOAT|DOUBLE|DECIMAL\(\d+,\d+\)"
_ROWS_AT_ONCE = 1 << 17


def load_concept_table(  # noqa: PLR0913 - a table, what it is brought to, what is taken and within what
    path: Path,
    out: Path,
    *,
    panel: Path,
    entities: Path,
    entity: str,
    time: str,
    meta: Path | None = None,
    only: Sequence[str] = ("*",),
    memory_limit: str = "2GB",
) -> list[ConceptInfo]:
    """Bring a table of concept values, one row per (entity, time), into the layout of evaluated concepts.

    Every column beside `entity` and `time` is a concept: BOOLEAN, or a number (NaN and infinity become
    null). Rows of the panel that the table lacks are null; rows that the panel lacks are dropped.

    Parameters
    ----------
    path
        Parquet, CSV or Arrow.
    out
        The Parquet file to write: the panel's `entity` and `time`, in its order, and a column per concept.
    panel, entities
        The canonical panel, and the map from its `entity` codes to the user's `id`.
    entity, time
        The table's columns with the user's id and the integer period index of the panel.
    meta
        Optional YAML: concept id -> text, kind, risk, category, regb_reason, owner, source; a column that
        it does not mention has its name as text and is of kind `point`.
    only
        Globs of the columns that are taken; the others are not read and may hold anything.
    memory_limit
        What DuckDB may use before it spills next to `out`.

    Raises
    ------
    ConceptError
        A missing or unfit column or name, a repeated (entity, time), no row in common with the panel,
        metadata that is wrong or about columns that are not there, or a query that failed.
    """
    with (
        _told(path),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".concepts-") as spill,
        connect(threads=2, memory_limit=memory_limit, spill=Path(spill)) as connection,
    ):
        load_table(connection, "given", [path], ids=[entity], error=ConceptError)
        load_table(connection, "panel", [panel], error=ConceptError)
        load_table(connection, "entities", [entities], error=ConceptError)
        lock(connection)
        kinds = {row[0]: str(row[1]) for row in connection.sql("DESCRIBE given").fetchall()}
        ids = [name for name in kinds if name not in (entity, time)]
        taken = [name for name in ids if any(fnmatch(name, glob) for glob in only)]
        _check(connection, path, kinds, taken, entity=entity, time=time)
        infos = _infos(taken, ids, kinds, meta)
        if not _write(_aligned(connection, kinds, taken, entity=entity, time=time), out):
            raise ConceptError(f"{path} has no row in common with the panel", do="check the ids and periods")
    return infos


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise ConceptError(
            f"{path} cannot be brought to the panel's rows",
            got=str(error).strip().split("\n")[0],
            do="check the file and concepts.memory_limit",
        ) from error


def _check(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    kinds: dict[str, str],
    taken: list[str],
    *,
    entity: str,
    time: str,
) -> None:
    """Refuse columns that are missing or unfit, and two rows for one entity and time."""
    problems = [f"no column {name!r}" for name in (entity, time) if name not in kinds]
    problems += _unfit(taken, kinds)
    if not problems and not re.fullmatch(_WHOLE, kinds[time]):
        problems.append(f"column {time!r} is {kinds[time]}, not the panel's period index")
    if problems:
        raise ConceptError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    key = f"CAST({quote(entity)} AS VARCHAR), {quote(time)}"
    repeated = f"SELECT {key}, count(*) FROM given GROUP BY ALL HAVING count(*) > 1 LIMIT 1"
    twice = connection.execute(repeated).fetchone()
    if twice:
        raise ConceptError(f"{path}: two rows for one entity and time", got=f"{twice[0]} at {twice[1]}")


def _aligned(
    connection: duckdb.DuckDBPyConnection, kinds: dict[str, str], taken: list[str], *, entity: str, time: str
) -> pa.RecordBatchReader:
    """Return the panel's rows in its order, `@found` where the table has them, and the concepts."""
    listed = ", ".join(
        f"CAST(g.{quote(id)} AS {'BOOLEAN' if kinds[id] == 'BOOLEAN' else 'DOUBLE'}) AS {quote(id)}"
        for id in taken
    )
    return connection.sql(
        f'SELECT p.entity, p.time, g.{quote(entity)} IS NOT NULL AS "@found", {listed} FROM panel AS p '
        f"JOIN entities AS e ON e.entity = p.entity LEFT JOIN given AS g "
        f"ON CAST(g.{quote(entity)} AS VARCHAR) = e.id AND g.{quote(time)} = p.time "
        "ORDER BY p.entity, p.time"
    ).to_arrow_reader(_ROWS_AT_ONCE)


def _unfit(taken: list[str], kinds: dict[str, str]) -> list[str]:
    problems = [] if taken else ["there is no concept column, or `only` takes none"]
    for name in taken:
        if not re.fullmatch(NAME, name) or name in RESERVED:
            problems.append(f"column {name!r} is not a concept id ({NAME}, and not reserved)")
        elif kinds[name] != "BOOLEAN" and not re.fullmatch(_NUMBER, kinds[name]):
            problems.append(f"column {name!r} is {kinds[name]}, not a truth value or a number")
    return problems


def _infos(taken: list[str], ids: list[str], kinds: dict[str, str], meta: Path | None) -> list[ConceptInfo]:
    tree = {} if meta is None else read_yaml(meta)
    if not isinstance(tree, dict):
        raise ConceptError(f"{meta} is not a mapping of concept ids")
    problems = [f"{meta}: {name}: the table has no such column" for name in tree if name not in ids]
    infos = []
    for name in taken:
        kind = "bool" if kinds[name] == "BOOLEAN" else "float"
        given = tree.get(name, {})
        if not isinstance(given, dict) or {"id", "type"} & set(given):
            problems.append(f"{meta}: {name}: a mapping without `id` and `type`, which the table decides")
            continue
        try:
            base = {"text": name, "kind": "point"}
            infos.append(ConceptInfo.model_validate(base | given | {"id": name, "type": kind}))
        except ValidationError as error:
            for item in error.errors(include_url=False):
                problems.append(f"{meta}: {name}: {'.'.join(map(str, item['loc']))}: {item['msg']}")
    if problems:
        raise ConceptError(f"{len(problems)} problem(s)\n  " + "\n  ".join(problems))
    return infos


def _write(batches: pa.RecordBatchReader, out: Path) -> bool:
    """Write the rows without `@found`, what is not finite as null; return whether any was found."""
    found = False
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    schema = batches.schema.remove(batches.schema.get_field_index("@found"))
    try:
        with pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            for batch in batches:
                found |= bool(pc.any(batch.column("@found")).as_py())
                columns = [_finite(batch.column(name)) for name in schema.names]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        if found:
            beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return found


def _finite(column: pa.Array) -> pa.Array:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
