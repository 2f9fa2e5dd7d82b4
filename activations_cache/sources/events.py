"""Irregular event sequences: one row per transaction, time in days, several on one day."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from activations_cache import sql
from activations_cache.models import module_hash
from activations_cache.panel import Panel
from activations_cache.splits import SplitConfig
from activations_cache.tables import code_ids, find_files, time_expression
from sae.errors import PanelError

from .base import ActivationSource, HarvestInputs, SourceConfig
from .reading import EntitySplits, HistoryFeed, ModelSource


class EventsSourceConfig(SourceConfig):
    """A table of events, read by a model whose adapter sees each entity's events in order."""

    needs: ClassVar[tuple[str, ...]] = ("model",)
    version: ClassVar[int] = 3

    kind: Literal["events"] = "events"
    path: str | tuple[str, ...]
    """Parquet, CSV or Arrow file, or several; a glob is allowed, in natural order (part-2 before part-10)."""
    entity: str
    """Column of the account or customer."""
    time: str
    """Column of the date; an integer is taken as it is."""
    period: Literal["day", "month"] = "day"
    """What one step of a date is; days count from 1970-01-01."""
    order: str | None = None
    """Column of numbers, dates or times that orders events of one time, null last; None: as in the table."""
    columns: dict[str, str] = Field(min_length=1)
    """Name -> SQL expression over the table's columns, read as a number; the adapter's `panel.values`."""
    split: SplitConfig = SplitConfig()
    """How entities are divided."""

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source."""
        assert inputs.model is not None
        panel, ids = read_events(self)
        model = inputs.model.load(inputs.fitted).to(inputs.device)
        provenance = {
            "source": self.to_dict(),
            "model": inputs.model.to_dict(),
            "weights": module_hash(model),
        }
        entities = pa.table({"entity": np.arange(len(ids)), "id": ids})
        feed = HistoryFeed(panel, entities, inputs.model.adapter(), seed=self.split.seed)
        return ModelSource(feed, model, inputs.hooks, provenance=provenance)

    def files(self) -> Sequence[Path]:
        """Return the tables."""
        return find_files([self.path] if isinstance(self.path, str) else self.path)


def read_events(config: EventsSourceConfig) -> tuple[Panel, pa.Array]:
    """Return the events laid out like a panel, except that several may share a time, and its entities' ids.

    Raises
    ------
    PanelError
        A missing file or column, an unsafe or failing expression, a null or unreadable entity or time, or an
        order that is text.
    """
    with sql.connect(threads=1, memory_limit="4GB", spill=None) as connection:
        available = sql.load_table(connection, "raw", config.files(), ids=[config.entity])
        sql.lock(connection)
        selected = _selection(config, available)
        time = time_expression(connection, "raw", config.time, config.period, files=config.files())
        head = [f"{sql.id_of(config.entity)} AS id", f"CAST({time} AS BIGINT) AS time"]
        if config.order is not None:
            head.append(f'{sql.quote(config.order)} AS "@order"')
        try:
            table = connection.sql(f"SELECT {', '.join([*head, *selected])} FROM raw").to_arrow_table()
        except duckdb.Error as error:
            raise PanelError(
                "source.columns cannot be computed as numbers", got=str(error).splitlines()[0]
            ) from error
    lost = [f"{name} in {table[name].null_count:,} rows" for name in ("id", "time") if table[name].null_count]
    if lost or not len(table):
        raise PanelError(
            "the events cannot be used as they are", got=f"null or unreadable {', '.join(lost) or 'rows'}"
        )
    entity, names = code_ids(table["id"])
    at = table["time"].to_numpy()
    first = () if config.order is None else (_ranks(table["@order"], config.order),)
    # stable, so ties stay as in the table
    order = np.lexsort((*first, at, entity))
    entity, at = entity[order], at[order]
    values = [table[name].to_numpy(zero_copy_only=False)[order].astype(np.float32) for name in config.columns]
    splits = EntitySplits(config.split, names)
    return Panel(
        columns=list(config.columns),
        values=np.stack(values, axis=1),
        entity=entity,
        time=at,
        offsets=np.flatnonzero(np.diff(entity, prepend=-1, append=len(names))),
        split=splits.of(entity, at),
        entity_split=splits.of_entity,
        inner=np.zeros(len(names), bool),
        outcome=None,
        outcome_per="row",
    ), names


def _ranks(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Return the place of every value among all, null last; numbers stay exact, whatever their type."""
    # as text 10 comes before 9
    if pa.types.is_string(column.type) or pa.types.is_nested(column.type):
        raise PanelError(
            f"source.order: {name} does not say which event is first",
            got=str(column.type),
            expected="numbers, dates or times",
            do="leave it out where the table is in order",
        )
    ranks: np.ndarray = pc.rank(column, tiebreaker="dense").to_numpy()
    return ranks


def _selection(config: EventsSourceConfig, available: Sequence[str]) -> list[str]:
    """Return the columns as admitted SQL; PanelError lists all that are wrong."""
    wanted = {"entity": config.entity, "time": config.time, "order": config.order}
    problems = [
        f"source.{k}: no column {v!r}" for k, v in wanted.items() if v is not None and v not in available
    ]
    selected = []
    for name, expression in config.columns.items():
        try:
            admitted = sql.parse_expression(expression, available).sql
            selected.append(f"CAST(({admitted}) AS DOUBLE) AS {sql.quote(name)}")
        except sql.ExpressionError as error:
            problems.append(f"source.columns.{name}: {expression!r}: {error}")
    if problems:
        raise PanelError(
            "the events do not have what the configuration names\n  " + "\n  ".join(problems),
            expected=f"the table's columns: {', '.join(available)}",
        )
    return selected
