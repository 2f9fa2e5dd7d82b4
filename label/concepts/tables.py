"""Ready-made concept values: a user's table, brought into the layout that `evaluate_concepts` writes."""

from __future__ import annotations

import os
import re
from pathlib import Path

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


def load_concept_table(
    path: Path, out: Path, *, panel: Path, entities: Path, entity: str, time: str, meta: Path | None = None
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

    Raises
    ------
    ConceptError
        A missing or unfit column or name, a repeated (entity, time), no row in common with the panel, or
        metadata that is wrong or about columns that are not there.
    """
    with connect(threads=2, memory_limit="2GB", spill=None) as connection:
        names = load_table(connection, "given", [path], ids=[entity], error=ConceptError)
        load_table(connection, "panel", [panel], error=ConceptError)
        load_table(connection, "entities", [entities], error=ConceptError)
        lock(connection)
        ids = [name for name in names if name not in (entity, time)]
        kinds = {row[0]: str(row[1]) for row in connection.sql("DESCRIBE given").fetchall()}
        problems = [f"no column {name!r}" for name in (entity, time) if name not in names]
        problems += _unfit(ids, kinds)
        if not problems and not re.fullmatch(_WHOLE, kinds[time]):
            problems.append(f"column {time!r} is {kinds[time]}, not the panel's period index")
        if problems:
            raise ConceptError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
        infos = _infos(ids, kinds, meta)
        key = f"CAST({quote(entity)} AS VARCHAR), {quote(time)}"
        repeated = f"SELECT {key}, count(*) FROM given GROUP BY ALL HAVING count(*) > 1 LIMIT 1"
        twice = connection.execute(repeated).fetchone()
        if twice:
            raise ConceptError(f"{path}: two rows for one entity and time", got=f"{twice[0]} at {twice[1]}")
        listed = ", ".join(
            f"CAST(g.{quote(id)} AS {'BOOLEAN' if kinds[id] == 'BOOLEAN' else 'DOUBLE'}) AS {quote(id)}"
            for id in ids
        )
        table = connection.sql(
            f'SELECT p.entity, p.time, g.{quote(entity)} IS NOT NULL AS "@found", {listed} FROM panel AS p '
            f"JOIN entities AS e ON e.entity = p.entity LEFT JOIN given AS g "
            f"ON CAST(g.{quote(entity)} AS VARCHAR) = e.id AND g.{quote(time)} = p.time "
            "ORDER BY p.entity, p.time"
        ).to_arrow_table()
    if not pc.any(table.column("@found")).as_py():
        raise ConceptError(f"{path} has no row in common with the panel", do="check the ids and periods")
    _write(table.drop_columns(["@found"]), out)
    return infos


def _unfit(ids: list[str], kinds: dict[str, str]) -> list[str]:
    problems = [] if ids else ["there is no concept column"]
    for name in ids:
        if not re.fullmatch(NAME, name) or name in RESERVED:
            problems.append(f"column {name!r} is not a concept id ({NAME}, and not reserved)")
        elif kinds[name] != "BOOLEAN" and not re.match(r"U?[A-Z]*INT|DOUBLE|FLOAT|DECIMAL", kinds[name]):
            problems.append(f"column {name!r} is {kinds[name]}, not a truth value or a number")
    return problems


def _infos(ids: list[str], kinds: dict[str, str], meta: Path | None) -> list[ConceptInfo]:
    tree = {} if meta is None else read_yaml(meta)
    if not isinstance(tree, dict):
        raise ConceptError(f"{meta} is not a mapping of concept ids")
    problems = [f"{meta}: {name}: the table has no such column" for name in tree if name not in ids]
    infos = []
    for name in ids:
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


def _write(table: pa.Table, out: Path) -> None:
    for index, column in enumerate(table.columns):
        if pa.types.is_floating(column.type):
            values = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
            table = table.set_column(index, table.column_names[index], values)
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        pq.write_table(table, beside, compression="zstd")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
