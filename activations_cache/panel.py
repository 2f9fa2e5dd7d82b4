"""The panel: account histories in canonical form, as everything downstream reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from pydantic import Field, field_validator

from sae.config import Config
from sae.errors import PanelError

from .splits import SPLITS, SplitConfig

FORMAT_VERSION = 1
RESERVED = ("entity", "id", "time", "time_as_given", "t", "split", "inner", "outcome")


class PanelConfig(Config):
    """Where the panel lies and what its columns mean."""

    path: str | tuple[str, ...] | None = None
    """Parquet, CSV or Arrow file, or several; a glob is allowed, in natural order. None with a `reference` section:
    the generated one."""
    product: str = "revolving"
    """What the accounts are; concepts name the products they make sense for."""
    entity: str
    """Column that identifies the account or customer."""
    time: str
    """Column of the period: an integer, a date, or text 'YYYY-MM' or 'YYYY-MM-DD'."""
    period: Literal["month", "day"] = "month"
    """What one step of a date is; integers are taken as they are, but for those that spell dates, such as 202012."""
    columns: dict[str, str] = Field(min_length=1)
    """Canonical name -> SQL expression over the file's columns, read as a number; what the model and concepts see."""
    audit: dict[str, str] = {}
    """Name -> SQL expression of attributes that only audits see (sex, age): never the model, never a label."""
    outcome: str | None = None
    """SQL expression of what the model predicts: 0, 1, or null for censored. None: no outcome."""
    outcome_per: Literal["entity", "row"] = "entity"
    """Whether the outcome is one per entity (constant over its rows) or one per row."""
    split: SplitConfig = SplitConfig()
    """How entities are divided into fit, discover and confirm."""

    @field_validator("columns")
    @classmethod
    def _names_are_free(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if not name.isidentifier() or name.lower() in RESERVED or name.lower().startswith("audit_"):
                raise ValueError(f"column name {name!r} is reserved or not a plain identifier")
        return columns

    @field_validator("columns", "audit")
    @classmethod
    def _names_differ(cls, columns: dict[str, str]) -> dict[str, str]:
        # DuckDB, which writes the panel, takes them for one
        lower = [name.lower() for name in columns]
        alike = sorted({name for name in lower if lower.count(name) > 1})
        if alike:
            raise ValueError(f"column names that differ in case alone: {', '.join(alike)}")
        return columns


@dataclass(frozen=True)
class Panel:
    """A canonical panel in memory, rows sorted by entity and time.

    Attributes
    ----------
    columns
        Canonical names, in the order of `values`.
    values
        float32 `[rows, columns]`; NaN = missing.
    entity, time
        int64 `[rows]`: the entity's code and the period index.
    offsets
        int64 `[entities + 1]`: rows of entity e are offsets[e]:offsets[e + 1].
    split
        int8 `[rows]`, an index into SPLITS.
    entity_split, inner
        Per entity: its split (before any time cut), and whether it decides early stopping.
    outcome
        float64 `[rows]`, NaN = censored; None without an outcome.
    outcome_per
        'entity' or 'row'.
    """

    columns: list[str]
    values: Float[np.ndarray, "rows columns"]
    entity: Int[np.ndarray, " rows"]
    time: Int[np.ndarray, " rows"]
    offsets: Int[np.ndarray, " bounds"]
    split: Int[np.ndarray, " rows"]
    entity_split: Int[np.ndarray, " entities"]
    inner: np.ndarray
    outcome: Float[np.ndarray, " rows"] | None
    outcome_per: str

    @property
    def n_entities(self) -> int:
        """Number of entities."""
        return len(self.offsets) - 1

    def entities_of(self, split: str) -> Int[np.ndarray, " entities"]:
        """Return the codes of the entities of one split."""
        return np.flatnonzero(self.entity_split == SPLITS.index(split))

    def history_end(self) -> Int[np.ndarray, " entities"]:
        """Return, per entity, the row after its last one before the time cut (its start where none is before)."""
        cut = self.split == SPLITS.index("out_of_time")
        return self.offsets[1:] - np.add.reduceat(cut.astype(np.int64), self.offsets[:-1])

    def judged(self, split: str) -> Int[np.ndarray, " entities"]:
        """Return the entities of one split with a row before the time cut; of outcomes per row, with a known one there."""
        counts = np.ones(len(self.split), dtype=bool)
        if self.outcome is not None and self.outcome_per == "row":
            counts = np.isfinite(self.outcome)
        before = np.append(0, np.cumsum(counts))
        some = before[self.history_end()] > before[self.offsets[:-1]]
        return np.flatnonzero(some & (self.entity_split == SPLITS.index(split)))

    @staticmethod
    def open(folder: Path) -> Panel:
        """Read what `prepare` wrote.

        Raises
        ------
        PanelError
            The folder holds no panel, or one of another format version.
        """
        profile = read_profile(folder)
        table = pq.read_table(folder / "panel.parquet")
        entity = table["entity"].to_numpy()
        offsets = np.flatnonzero(np.diff(entity, prepend=-1, append=profile["entities"]))
        columns: list[str] = profile["columns"]
        values = np.stack(
            [pc.cast(table[c], pa.float32()).to_numpy(zero_copy_only=False) for c in columns], axis=1
        )
        split = _codes(table["split"])
        per_entity = pq.read_table(folder / "entities.parquet")
        return Panel(
            columns=columns,
            values=np.ascontiguousarray(values),
            entity=entity,
            time=table["time"].to_numpy(),
            offsets=offsets,
            split=split,
            entity_split=_codes(per_entity["split"]),
            inner=per_entity["inner"].to_numpy(zero_copy_only=False),
            outcome=table["outcome"].to_numpy(zero_copy_only=False)
            if "outcome" in table.column_names
            else None,
            outcome_per=profile["outcome_per"],
        )


def read_profile(folder: Path) -> dict[str, Any]:
    """Return the stored profile of a prepared panel; PanelError where there is none, or a damaged one."""
    path = folder / "profile.json"
    if not path.is_file():
        raise PanelError(f"no panel in {folder}", do="run `assay run` first, or check the path")
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(profile, dict):
            raise TypeError("it is no mapping")
    except (OSError, ValueError, TypeError) as error:
        raise PanelError(
            f"{path} is damaged", got=str(error), do="remove the panel, and run again"
        ) from error
    if profile.get("format_version") != FORMAT_VERSION:
        raise PanelError(f"{path} has format {profile.get('format_version')}", expected=str(FORMAT_VERSION))
    return profile


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Turn split names into indices into SPLITS."""
    codes: np.ndarray = pc.index_in(column, pa.array(SPLITS)).to_numpy().astype(np.int8)
    return codes
