"""Concept values for a whole panel: one query for all concepts, in a child process, written as Parquet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.errors import ConceptError

from .library import Concept
from .query import Plan, select
from .safety import run_child

WORKER = "label.concepts.worker"
ROWS_AT_ONCE = 500_000
"""Entities are computed in blocks of about this many rows, so that memory does not grow with the panel."""


@dataclass(frozen=True)
class ConceptValues:
    """What a concept came to on a panel: the share of nulls, and the mean of the others."""

    id: str
    type: str
    nulls: float
    mean: float | None


@dataclass(frozen=True)
class ConceptReport:
    """The outcome of `evaluate_concepts`."""

    out: Path
    rows: int
    seconds: float
    values: tuple[ConceptValues, ...]


def evaluate_concepts(
    concepts: Sequence[Concept],
    panel: Path,
    out: Path,
    *,
    timeout_s: float = 3600.0,
    memory_limit: str = "2GB",
    threads: int = 2,
) -> ConceptReport:
    """Compute concepts on every row of a canonical panel.

    Values that are not finite become null. The same panel and thread count give the same file; window sums
    may differ in the last bits between thread counts.

    Parameters
    ----------
    concepts
        Those of `ConceptLibrary.applicable`.
    panel
        The canonical panel, sorted by (`entity`, `time`); `t` in an expression is its `time`.
    out
        The Parquet file to write, beside first and then renamed: `entity`, `time`, and a BOOLEAN or DOUBLE
        column per concept, in the panel's row order.
    timeout_s
        Wall time of the child process; its processor time is limited to this times `threads`.
    memory_limit
        What DuckDB may use before it spills next to `out`; the child's address space is limited above it.
    threads
        Threads of the child.

    Raises
    ------
    ConceptError
        Nothing to compute, the panel lacks a column, or the child ran out of time or memory or failed; the
        concept is named where it is known.
    """
    if not concepts:
        raise ConceptError("no concept applies to this panel", do="see `assay concepts check`")
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        lines = run_child(
            WORKER,
            make_job(
                panel,
                [make_task(concepts, out=beside)],
                columns=columns_of(concepts),
                folder=out.parent,
                timeout_s=timeout_s,
                memory_limit=memory_limit,
                threads=threads,
            ),
            timeout_s=timeout_s,
        )
        done = next(line for line in lines if "task" in line)
        values = tuple(_values(beside, concept) for concept in concepts)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return ConceptReport(out, int(done["rows"]), float(done["seconds"]), values)


def columns_of(concepts: Sequence[Concept]) -> list[str]:
    """Return the panel columns that these concepts read."""
    return sorted(frozenset().union(*(concept.columns for concept in concepts)))


def make_job(
    panel: Path,
    tasks: Sequence[dict[str, Any]],
    *,
    columns: Sequence[str],
    folder: Path,
    timeout_s: float,
    memory_limit: str,
    threads: int,
    sample: float | None = None,
) -> dict[str, Any]:
    """Describe what to load (`sample` = a share of the entities, in memory) and what to compute."""
    return {
        "panel": str(panel),
        "tasks": list(tasks),
        "columns": list(columns),
        "folder": str(folder),
        "timeout_s": timeout_s,
        "memory_limit": memory_limit,
        "threads": threads,
        "sample": sample,
        "rows_at_once": ROWS_AT_ONCE,
    }


def make_task(
    concepts: Sequence[Concept], *, out: Path | None, until: int | None = None, name: str = "the concepts"
) -> dict[str, Any]:
    """Describe one computation: concepts on the rows up to time `until`, written or only timed."""
    return {
        "name": name,
        "query": _query(concepts),
        "alone": {concept.id: _query([concept]) for concept in concepts} if len(concepts) > 1 else {},
        "ids": [concept.id for concept in concepts],
        "out": None if out is None else str(out),
        "until": until,
    }


def _query(concepts: Sequence[Concept]) -> str:
    helpers = {helper.name: helper for concept in concepts for helper in concept.helpers}
    ordered = sorted(helpers.values(), key=lambda helper: (helper.level, helper.name))
    frames = {name: frame for concept in concepts for name, frame in concept.frames.items()}
    plan = Plan(tuple(columns_of(concepts)), tuple(ordered), frames)
    return select(plan, [_output(concept) for concept in concepts])


def _output(concept: Concept) -> str:
    full = f'"@age" >= {concept.history}'
    if concept.ahead:
        full += f" AND time + {concept.ahead} <= (SELECT max(time) FROM panel)"
    target = "BOOLEAN" if concept.type == "bool" else "DOUBLE"
    return f"CASE WHEN {full} THEN CAST({concept.expression.sql} AS {target}) END"


def _values(path: Path, concept: Concept) -> ConceptValues:
    column = pq.read_table(path, columns=[concept.id]).column(0)
    mean = pc.mean(column).as_py()
    return ConceptValues(concept.id, concept.type, column.null_count / max(len(column), 1), mean)
