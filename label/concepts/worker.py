"""The child process that computes concepts: a job on stdin, progress and results as JSON lines on stdout."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from activations_cache.sql import connect, load_table, lock, quote
from sae.errors import ConceptError, UserError

from .query import ROWS
from .safety import limit_this_process

SPILL = 8
"""How many times the memory limit may be on disk; blocks of entities need far less."""
ADDRESS_SPACE = 6 * 2**30
"""What the interpreter and its libraries may map beside twice the memory limit, mostly never touched."""
ENTITY_PRIME = 2_654_435_761


def main() -> None:
    """Read the job, limit this process, run every task; a user's error becomes one line that says so."""
    job = json.load(sys.stdin)
    try:
        memory = _bytes(job["memory_limit"])
        seconds = int(job["timeout_s"] * max(job["threads"], 1)) + 10
        limit_this_process(memory_bytes=2 * memory + ADDRESS_SPACE, cpu_seconds=seconds)
        with tempfile.TemporaryDirectory(dir=job["folder"], prefix=".concepts-") as spill:
            connection = connect(
                threads=job["threads"],
                memory_limit=job["memory_limit"],
                spill=Path(spill),
                spill_limit=f"{SPILL * memory // 1024}KiB",
            )
            _load(connection, job)
            for task in job["tasks"]:
                _say(working_on=task["name"])
                _say(task=task["name"], **_run(connection, task, job["rows_at_once"]))
            connection.close()
    except UserError as error:
        _say(error=str(error))
    except (duckdb.Error, pa.ArrowException, OSError, MemoryError) as error:
        _say(error=str(error).strip().split("\n")[0] or "out of memory")


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _bytes(text: str) -> int:
    number = text.rstrip("KMGTiB ")
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    unit = text[len(number) :].strip().rstrip("B").rstrip("i")
    try:
        return int(float(number) * 1024 ** powers[unit])
    except (ValueError, KeyError) as error:
        raise ConceptError("the memory limit cannot be read", got=text, expected="such as 2GB") from error


def _load(connection: duckdb.DuckDBPyConnection, job: dict[str, Any]) -> None:
    """Make the panel readable as `panel`: lazily, or a sample of its entities in memory; then lock."""
    found = load_table(connection, "source", [Path(job["panel"])], error=ConceptError)
    missing = [name for name in ("entity", "time", *job["columns"]) if name not in found]
    if missing:
        raise ConceptError(f"the panel {job['panel']} lacks columns", got=", ".join(missing))
    finite = [
        f"CASE WHEN isfinite({quote(c)}) THEN {quote(c)}::DOUBLE END AS {quote(c)}" for c in job["columns"]
    ]
    listed = ", ".join(["entity::BIGINT AS entity", "time::BIGINT AS time", *finite])
    if job["sample"] is None:
        connection.execute(f"CREATE VIEW panel AS SELECT {listed} FROM source")
    else:
        share = int(job["sample"] * 2**32)
        chosen = f"(entity * {ENTITY_PRIME}) % {2**32} < {share}"
        connection.execute(
            f"CREATE TABLE panel AS SELECT {listed} FROM source WHERE {chosen} ORDER BY entity, time"
        )
    lock(connection)


def _run(connection: duckdb.DuckDBPyConnection, task: dict[str, Any], rows_at_once: int) -> dict[str, Any]:
    """Run a task by blocks of entities, write the values if it has an output, return rows and seconds."""
    start = time.perf_counter()
    rows = 0
    writer: pq.ParquetWriter | None = None
    try:
        for first, last in _blocks(connection, rows_at_once):
            where = f"WHERE entity BETWEEN {first} AND {last}"
            where += "" if task["until"] is None else f" AND time <= {int(task['until'])}"
            table = _finite(_execute(connection, task, where))
            rows += table.num_rows
            if task["out"] is None:
                continue
            table = table.rename_columns(["entity", "time", *task["ids"]])
            if writer is None:
                writer = pq.ParquetWriter(task["out"], table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    return {"rows": rows, "seconds": time.perf_counter() - start}


def _blocks(connection: duckdb.DuckDBPyConnection, rows_at_once: int) -> list[tuple[int, int]]:
    """Cut the entities into ranges of about `rows_at_once` rows; memory does not grow with the panel."""
    counts = connection.execute(
        "SELECT entity, count(*) AS n FROM panel GROUP BY entity ORDER BY entity"
    ).fetchnumpy()
    entities = np.asarray(counts["entity"], dtype=np.int64)
    if not len(entities):
        raise ConceptError("the panel has no rows")
    block = (np.cumsum(counts["n"]) - 1) // rows_at_once
    starts = np.flatnonzero(np.r_[True, block[1:] != block[:-1]])
    ends = np.r_[starts[1:] - 1, len(entities) - 1]
    return [(int(entities[a]), int(entities[b])) for a, b in zip(starts, ends, strict=True)]


def _execute(connection: duckdb.DuckDBPyConnection, task: dict[str, Any], where: str) -> pa.Table:
    """Run the query on some rows; if it fails, one by one, so that the last one announced is the cause."""
    try:
        return connection.sql(task["query"].replace(ROWS, where)).to_arrow_table()
    except duckdb.Error:
        for name, alone in task["alone"].items():
            _say(working_on=f"concept {name}")
            connection.sql(alone.replace(ROWS, where)).to_arrow_table()
        _say(working_on=task["name"])
        raise


def _finite(table: pa.Table) -> pa.Table:
    """Set what is not finite to null."""
    for index, column in enumerate(table.columns):
        if pa.types.is_floating(column.type):
            kept = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
            table = table.set_column(index, table.column_names[index], kept)
    return table


if __name__ == "__main__":
    main()
