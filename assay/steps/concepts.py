"""Evaluating the concepts on every row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from activations_cache.store import ActivationStore
from assay.config import RunConfig
from assay.stages import Context
from label.concepts.evaluation import evaluate_concepts
from label.concepts.language import load_concepts
from label.concepts.library import ConceptInfo, NotApplicable
from label.concepts.tables import load_concept_table
from sae.errors import ConceptError, ConfigError

InfoT = TypeVar("InfoT", bound=ConceptInfo)


def check_concepts(config: RunConfig) -> None:
    """Read the concept files, and find the tables that no stage makes.

    Raises
    ------
    ConceptError
        A file is wrong or absent, or there would be no concept at all.
    """
    assert config.concepts is not None
    if config.concepts.paths:
        library = load_concepts([Path(p) for p in config.concepts.paths])
        if config.panel is not None and config.reads_panel and not config.concepts.tables:
            found, skipped = library.applicable(config.panel.product, list(config.panel.columns))
            labels, ahead = _without_outcomes(found)
            if not labels:
                reasons = [f"{s.id}: {s.reason}" for s in (*skipped, *ahead)]
                raise ConceptError(
                    "no concept applies to this panel",
                    got="; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else ""),
                    do="check concepts.paths, panel.product and panel.columns",
                )
    for table in config.concepts.tables:
        for path in (table.path, table.meta):
            if path is not None and "{run}" not in path and not Path(path).is_file():
                raise ConceptError(f"no file at {path}", do="check `concepts.tables`")


def make_concepts(context: Context, out: Path) -> None:
    """Evaluate the concepts on every row of the panel."""
    config = context.config.concepts
    assert config is not None
    out.mkdir()
    panel, entities = _rows_for_concepts(context, out)
    tables: list[dict[str, Any]] = []
    skipped: list[NotApplicable] = []
    if config.paths and context.config.panel is not None and context.config.reads_panel:
        library = load_concepts([Path(p) for p in config.paths])
        fit_, skipped = library.applicable(context.config.panel.product, list(context.config.panel.columns))
        labels, ahead = _without_outcomes(fit_)
        skipped += ahead
        if labels:
            report = evaluate_concepts(
                labels,
                panel,
                out / "values.parquet",
                timeout_s=config.timeout_s,
                memory_limit=config.memory_limit,
                threads=torch.get_num_threads(),
            )
            context.console.note(
                f"{len(labels)} concepts on {report.rows:,} rows; {len(skipped)} not applicable"
            )
            fields = set(ConceptInfo.model_fields)
            written = [c.model_dump(include=fields, mode="json") for c in labels]
            tables.append({"file": "values.parquet", "concepts": written})
        (out / "expressions.json").write_text(json.dumps({c.id: c.expr for c in labels}, indent=1))
    for i, table in enumerate(config.tables):
        file = f"table_{i}.parquet"
        infos = load_concept_table(
            _inside(context, table.path),
            out / file,
            panel=panel,
            entities=entities,
            entity=table.entity,
            time=table.time,
            meta=None if table.meta is None else _inside(context, table.meta),
            only=table.only,
            memory_limit=config.memory_limit,
        )
        kept, ahead = _without_outcomes(infos)
        skipped += ahead
        tables.append({"file": file, "concepts": [info.to_dict() for info in kept]})
    _refuse_repeats([c["id"] for t in tables for c in t["concepts"]])
    record = {"format_version": 1, "tables": tables, "not_applicable": [list(s) for s in skipped]}
    (out / "concepts.json").write_text(json.dumps(record, indent=1))


def _without_outcomes(infos: Sequence[InfoT]) -> tuple[list[InfoT], list[NotApplicable]]:
    """Return the concepts that may make a label, and those that look ahead."""
    ahead = [
        NotApplicable(info.id, "it looks ahead, so it never makes a label")
        for info in infos
        if info.kind == "outcome"
    ]
    return [info for info in infos if info.kind != "outcome"], ahead


def _rows_for_concepts(context: Context, out: Path) -> tuple[Path, Path]:
    """Return the files that say which rows and entities there are; without a panel they come from the store."""
    if context.config.reads_panel:
        return context.folder / "panel" / "panel.parquet", context.folder / "panel" / "entities.parquet"
    store = ActivationStore.open(context.folder / "activations.zarr")
    parts = [store.coordinates(split) for split, rows in store.splits.items() if rows]
    entity, time = (np.concatenate([p[i] for p in parts]) for i in (0, 2))
    # several rows may share a time, such as events of one day
    rows = np.unique(np.stack([entity, time], axis=1), axis=0)
    pq.write_table(pa.table({"entity": rows[:, 0], "time": rows[:, 1]}), out / "rows.parquet")
    pq.write_table(store.entity_ids(), out / "entities.parquet")
    return out / "rows.parquet", out / "entities.parquet"


def _inside(context: Context, path: str) -> Path:
    """Return a path of the configuration; `{run}` stands for the run folder."""
    found = Path(path.replace("{run}", str(context.folder))).expanduser()
    if not found.is_file():
        raise ConfigError(
            f"concepts.tables: no file at {found}", do="check the path; {run} stands for the run folder"
        )
    return found


def _refuse_repeats(ids: Sequence[str]) -> None:
    repeated = sorted({i for i in ids if ids.count(i) > 1})
    if repeated:
        raise ConceptError(
            f"concepts with the same id in several files: {', '.join(repeated)}",
            do="leave one of them out, with concepts.tables[].only for a table",
        )
