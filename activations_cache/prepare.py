"""Preparing a panel: any long table of account rows becomes one canonical, checked Parquet file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.errors import PanelError

from . import sql
from .panel import FORMAT_VERSION, PanelConfig
from .splits import SPLITS, assign_splits
from .tables import find_files, time_expression, written_period

MEMORY_LIMIT = "4GB"
"""What DuckDB may hold while it reads the user's table; more is spilled beside the panel."""
_TOO_LARGE = 2.0**128 - 2.0**103
"""From here on numbers round to infinity in float32, as models read them."""


def prepare(config: PanelConfig, out: Path, *, threads: int = 2) -> dict[str, Any]:
    """Read the user's table, check it, and write the canonical panel into `out`.

    Writes panel.parquet, entities.parquet and profile.json (see the architecture page).

    Returns
    -------
    dict
        The profile: rows, entities, periods, rows per entity, missing shares and quantiles of every column, the
        outcome's rate, and rows and entities of every split.

    Raises
    ------
    PanelError
        A missing file or column, an unsafe or failing expression, a null or unparsable time, a duplicate
        (entity, time), a value that float32 cannot hold, an outcome other than 0, 1 or null or not constant
        within an entity, or a split without entities; all problems of one kind are listed together.
    """
    if config.path is None:
        raise PanelError("panel.path is not set", do="give panel.path=FILE, or a `reference` section")
    paths = find_files([config.path] if isinstance(config.path, str) else config.path)
    with sql.connect(threads=threads, memory_limit=MEMORY_LIMIT, spill=out) as connection:
        available = sql.load_table(connection, "raw", paths, ids=[config.entity])
        sql.lock(connection)
        _canonical(connection, config, _check_config(config, available), paths)
        _check_rows(connection, config)
        table = connection.sql("SELECT * FROM canonical ORDER BY id, time").to_arrow_table()
    return _write(config, table, out)


def _check_config(config: PanelConfig, available: Sequence[str]) -> dict[str, str]:
    """Return the admitted SQL of every canonical column; PanelError lists everything that is wrong."""
    problems = [
        f"panel.{key}: no column {name!r}"
        for key, name in (("entity", config.entity), ("time", config.time))
        if name not in available
    ]
    expressions = {f"columns.{k}": v for k, v in config.columns.items()}
    expressions |= {f"audit.{k}": v for k, v in config.audit.items()}
    if config.outcome is not None:
        expressions["outcome"] = config.outcome
    admitted: dict[str, str] = {}
    for key, expression in expressions.items():
        try:
            admitted[key.removeprefix("columns.").replace("audit.", "audit_")] = sql.parse_expression(
                expression, available
            ).sql
        except sql.ExpressionError as error:
            problems.append(f"panel.{key}: {expression!r}: {error}")
    if problems:
        raise PanelError(
            "the panel does not have what the configuration names\n  " + "\n  ".join(problems),
            expected=f"the table's columns: {', '.join(available)}",
        )
    return admitted


def _canonical(
    connection: duckdb.DuckDBPyConnection,
    config: PanelConfig,
    admitted: dict[str, str],
    paths: Sequence[Path],
) -> None:
    time = time_expression(connection, "raw", config.time, config.period, files=paths)
    parts = [f"{sql.id_of(config.entity)} AS id", f"{time} AS time"]
    parts += [f"{sql.quote(config.time)} AS time_as_given"]
    failures = []
    for name, expression in admitted.items():
        cast = "VARCHAR" if name.startswith("audit_") else "DOUBLE"
        part = f"CAST(({expression}) AS {cast}) AS {sql.quote(name)}"
        try:
            connection.execute(f"SELECT count({sql.quote(name)}) FROM (SELECT {part} FROM raw)").fetchone()
        except duckdb.Error as error:
            failures.append(f"{name} = {expression}: {str(error).splitlines()[0]}")
        parts.append(part)
    if failures:
        raise PanelError("these panel columns cannot be computed as numbers\n  " + "\n  ".join(failures))
    connection.execute(f"CREATE TABLE canonical AS SELECT {', '.join(parts)} FROM raw")


def _check_rows(connection: duckdb.DuckDBPyConnection, config: PanelConfig) -> None:
    def offending(query: str) -> tuple[int, str]:
        rows = connection.execute(query).fetchall()
        shown = "; ".join(", ".join(str(v) for v in row) for row in rows[:5])
        return len(rows), shown

    total = connection.execute("SELECT count(*) FROM canonical").fetchone()
    if not total or not total[0]:
        raise PanelError("the panel has no rows")
    checks = [
        ("rows without an entity", "SELECT time_as_given FROM canonical WHERE id IS NULL"),
        (
            f"rows whose time ({config.time}) is null or cannot be read",
            "SELECT id, time_as_given FROM canonical WHERE time IS NULL",
        ),
        (
            "(entity, time) that occur more than once",
            "SELECT id, any_value(time_as_given), count(*) || ' rows' FROM canonical "
            "GROUP BY id, time HAVING count(*) > 1 ORDER BY 1, 2",
        ),
    ]
    for name in config.columns:
        # NaN is larger than infinity here
        infinite = f"abs({sql.quote(name)}) BETWEEN {_TOO_LARGE!r} AND 'infinity'"
        checks.append(
            (
                f"values in {name} that are infinite, or would be as float32",
                f"SELECT id, time_as_given FROM canonical WHERE {infinite}",
            )
        )
    if config.outcome is not None:
        checks.append(
            (
                "outcomes other than 0, 1 or null",
                "SELECT DISTINCT outcome FROM canonical WHERE outcome NOT IN (0, 1)",
            )
        )
        if config.outcome_per == "entity":
            checks.append(
                (
                    "entities whose outcome is not constant over their rows",
                    "SELECT id FROM canonical GROUP BY id HAVING count(DISTINCT outcome) > 1 "
                    "OR count(outcome) NOT IN (0, count(*)) ORDER BY 1",
                )
            )
    problems = []
    for what, query in checks:
        count, shown = offending(query)
        if count:
            problems.append(f"{count} {what}: {shown}{' ...' if count > 5 else ''}")
    if problems:
        raise PanelError(
            "the panel cannot be used as it is\n  " + "\n  ".join(problems),
            do="mend the table, or the expressions in panel:",
        )


def _write(config: PanelConfig, table: pa.Table, out: Path) -> dict[str, Any]:
    ids = table["id"].combine_chunks()
    encoded = ids.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    entity = encoded.indices.to_numpy().astype(np.int64)
    entity_split, inner = assign_splits(config.split, names)
    time = table["time"].to_numpy().astype(np.int64)
    split = entity_split[entity]
    calendar = None if _is_number(table["time_as_given"].type) else config.period
    if config.split.out_of_time is not None:
        late = time >= _period(config, number=calendar is None)
        if late.all() or not late.any():
            side = "before" if late.all() else "after"
            raise PanelError(
                f"panel.split.out_of_time={config.split.out_of_time!r} leaves nothing {side} it",
                got=" to ".join(written_period(int(t), calendar) for t in (time.min(), time.max())),
                do="choose a period within the panel's",
            )
        split = np.where(late, SPLITS.index("out_of_time"), split).astype(np.int8)
    counts = np.bincount(entity_split, minlength=3)[:3]
    if (counts == 0).any():
        empty = [SPLITS[i] for i in range(3) if not counts[i]]
        raise PanelError(
            f"no entity falls into {', '.join(empty)}",
            got=f"{len(names)} entities",
            do="use a panel with more entities, or change panel.split",
        )
    keep = [*config.columns, *(f"audit_{name}" for name in config.audit)]
    data = {"entity": pa.array(entity), "time": pa.array(time), "split": pa.array(np.array(SPLITS)[split])}
    for name in keep:
        column = table[name]
        data[name] = column if name.startswith("audit_") else pc.if_else(pc.is_nan(column), None, column)
    if config.outcome is not None:
        data["outcome"] = table["outcome"]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(data), out / "panel.parquet", row_group_size=1 << 17)
    per_entity = {
        "entity": np.arange(len(names)),
        "id": names,
        "split": np.array(SPLITS)[entity_split],
        "inner": inner,
    }
    pq.write_table(pa.table(per_entity), out / "entities.parquet")
    profile = _profile(config, pa.table(data), entity, split, entity_split) | {"calendar": calendar}
    (out / "profile.json").write_text(json.dumps(profile, indent=1))
    return profile


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _period(config: PanelConfig, *, number: bool) -> int:
    """Return the first period out of time; `number` = the panel counts its periods itself."""
    cut = config.split.out_of_time
    if isinstance(cut, int):
        return cut
    if number:
        raise PanelError(
            f"panel.split.out_of_time={cut!r} is a date, and {config.time} counts periods",
            expected="a number, as in that column",
        )
    try:
        year, month, *day = (int(part) for part in str(cut).split("-"))
        date = np.datetime64(f"{year:04d}-{month:02d}-{day[0] if day else 1:02d}")
        if config.period == "month":
            return year * 12 + month - 1
        return int((date - np.datetime64("1970-01-01")).astype(int))
    except ValueError as error:
        raise PanelError(
            f"cannot read panel.split.out_of_time={cut!r}", expected="a period number or 'YYYY-MM'"
        ) from error


def _profile(
    config: PanelConfig, table: pa.Table, entity: np.ndarray, split: np.ndarray, entity_split: np.ndarray
) -> dict[str, Any]:
    time = table["time"].to_numpy()
    length = np.bincount(entity)
    same = np.diff(entity) == 0
    gaps = int((np.diff(time)[same] > 1).sum())
    columns = {}
    for name in config.columns:
        values = pc.drop_null(table[name]).to_numpy()
        quantiles = np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist() if len(values) else None
        columns[name] = {
            "missing": 1 - len(values) / len(time),
            "quantiles": quantiles,
            "distinct": len(np.unique(values)),
        }
    last = np.cumsum(length) - 1
    outcome = table["outcome"].to_numpy(zero_copy_only=False) if "outcome" in table.column_names else None
    judged = None if outcome is None else outcome[last] if config.outcome_per == "entity" else outcome
    known = None if judged is None else judged[np.isfinite(judged)]
    return {
        "format_version": FORMAT_VERSION,
        "product": config.product,
        "columns": list(config.columns),
        "audit": list(config.audit),
        "outcome_per": config.outcome_per,
        "rows": len(time),
        "entities": len(length),
        "first_period": int(time.min()),
        "last_period": int(time.max()),
        "rows_per_entity": np.quantile(length, [0, 0.25, 0.5, 0.75, 1]).astype(int).tolist(),
        "gaps": gaps,
        "outcome_rate": None if known is None or not len(known) else float(known.mean()),
        "outcome_known": None if known is None else len(known),
        "column_profile": columns,
        "splits": {
            name: {"entities": int((entity_split == i).sum()), "rows": int((split == i).sum())}
            for i, name in enumerate(SPLITS)
        },
    }
