"""Ready-made activations in files, from whatever framework: npy, safetensors, Parquet, streamed in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int
from pydantic import Field

from activations_cache import sql
from activations_cache.matrices import open_matrix
from activations_cache.splits import SplitConfig
from activations_cache.tables import code_ids, find_files, time_expression
from sae.config import Config
from sae.errors import ConfigError
from sae.world import World

from .base import ActivationBatch, ActivationSource, HarvestInputs, SourceConfig
from .reading import EntitySplits

BATCH_BYTES = 16 << 20
"""Read at once: large enough for the disk, small beside a block of the store."""
LONELY = SplitConfig(fit=0.98, discover=0.01)
"""Rows without coordinates only train a dictionary: 98% do, the rest measures it."""


class CoordinatesConfig(Config):
    """A table with one row per row of the tensors, in the same order: who and when."""

    path: str
    """Parquet, CSV or Arrow file."""
    entity: str = "entity"
    """Column of the account, customer or document."""
    time: str | None = "time"
    """Column of the period: an integer, a date, or text 'YYYY-MM' or 'YYYY-MM-DD'. None: the position."""
    position: str | None = None
    """Column of the row's index within its entity. None: counted in the order of time, then of the table."""
    period: Literal["month", "day"] = "month"
    """What one step of a date is; integers are taken as they are, but for those that spell dates, such as 202012."""


class TensorsSourceConfig(SourceConfig):
    """Activations in files of shape [rows, d_in]."""

    version: ClassVar[int] = 2

    kind: Literal["tensors"] = "tensors"
    path: str | tuple[str, ...]
    """npy, safetensors or Parquet file, or several of one width, in the order of the rows; globs are allowed, and
    are read in natural order (part-2 before part-10)."""
    key: str | None = None
    """Tensor of a safetensors file, or column of lists of a Parquet file; needed only where there are
    several. A Parquet file without a column of lists has one column per dimension."""
    hook: str = Field(default="activations", min_length=1)
    """Name under which they are stored."""
    coordinates: CoordinatesConfig | None = None
    """Who and when; None: every row is its own entity at time 0."""
    split: SplitConfig | None = None
    """How entities are divided. None: 60, 20 and 20% with coordinates; 98, 1 and 1% without."""

    def build(self, *, inputs: HarvestInputs) -> ActivationSource:
        """Return the source; it needs nothing of the run."""
        return TensorsSource(self)

    def files(self) -> Sequence[Path]:
        """Return the tensors and their coordinates."""
        found = find_files([self.path] if isinstance(self.path, str) else self.path)
        return found if self.coordinates is None else [*found, Path(self.coordinates.path).expanduser()]


class Coordinates(NamedTuple):
    """Who and when, per row."""

    entity: Int[np.ndarray, " rows"]
    position: Int[np.ndarray, " rows"]
    time: Int[np.ndarray, " rows"]


class TensorsSource:
    """Rows of matrices in files, read through memory maps a few megabytes at a time."""

    def __init__(self, config: TensorsSourceConfig) -> None:
        paths = find_files([config.path] if isinstance(config.path, str) else config.path)
        self.matrices = [open_matrix(path, config.key) for path in paths]
        widths = {matrix.width for matrix in self.matrices}
        if len(widths) > 1:
            listed = ", ".join(f"{p.name} {m.width}" for p, m in zip(paths, self.matrices, strict=True))
            raise ConfigError(
                "source.path: the files differ in width", got=listed, expected="the same d_in in all"
            )
        self.hook, width = config.hook, widths.pop()
        self.hooks = {self.hook: width}
        self.n_rows = sum(matrix.rows for matrix in self.matrices)
        self._batch_rows = max(1, BATCH_BYTES // (4 * width))
        self.provenance: dict[str, Any] = {"source": config.to_dict()}
        self._at: Coordinates | None = None
        if config.coordinates is None:
            ids = pc.cast(pa.array(np.arange(self.n_rows)), pa.string())
        else:
            self._at, ids = read_coordinates(config.coordinates, self.n_rows)
        self.entities = pa.table({"entity": np.arange(len(ids)), "id": ids})
        default = LONELY if config.coordinates is None else SplitConfig()
        self._splits = EntitySplits(config.split or default, ids)

    def batches(self, world: World, cursor: int = 0) -> Iterator[ActivationBatch]:
        """Yield this rank's rows of every stretch of the files from `cursor` on."""
        for index, start in enumerate(range(0, self.n_rows, self._batch_rows)):
            if index < cursor:
                continue
            at = self._coordinates(start, min(start + self._batch_rows, self.n_rows))
            mine = np.floor(self._splits.rank[at.entity] * world.size) == world.rank
            if mine.any():
                entity, position, time = (column[mine] for column in at)
                acts = {self.hook: self._rows(start, start + len(mine))[mine]}
                yield ActivationBatch(acts, entity, position, time, self._splits.of(entity, time), index + 1)

    def write_truth(self, folder: Path) -> None:
        """Write nothing: what the activations encode is not known."""

    def _coordinates(self, start: int, stop: int) -> Coordinates:
        if self._at is not None:
            return Coordinates(*(column[start:stop] for column in self._at))
        zero = np.zeros(stop - start, np.int64)
        return Coordinates(np.arange(start, stop), zero, zero)

    def _rows(self, start: int, stop: int) -> Float[np.ndarray, "rows d_in"]:
        parts, first = [], 0
        for matrix in self.matrices:
            a, b = max(start - first, 0), min(stop - first, matrix.rows)
            if a < b:
                parts.append(matrix.read(a, b))
            first += matrix.rows
        return np.concatenate(parts)


def read_coordinates(config: CoordinatesConfig, n_rows: int) -> tuple[Coordinates, pa.Array]:
    """Return the coordinates of every row, and the ids that entity codes count through, sorted.

    Raises
    ------
    ConfigError
        A column is missing, an entity or time is null or unreadable, the table has another number of rows
        than the tensors, or an entity has one position twice.
    PanelError
        Integer times spell dates.
    """
    path = Path(config.path).expanduser()
    where = f"source.coordinates ({path})"
    with sql.connect(threads=1, memory_limit="4GB", spill=None) as connection:
        names = sql.load_table(connection, "given", [path], ids=[config.entity], error=ConfigError)
        sql.lock(connection)
        lost = [c for c in (config.entity, config.time, config.position) if c is not None and c not in names]
        if lost:
            raise ConfigError(f"{where} lacks {', '.join(lost)}", expected=f"its columns: {', '.join(names)}")
        parts = [f"{sql.id_of(config.entity)} AS id"]
        if config.time is not None:
            time = time_expression(connection, "given", config.time, config.period, files=[path])
            parts.append(f"CAST({time} AS BIGINT) AS time")
        if config.position is not None:
            place = sql.quote(config.position)
            whole = f"TRY_CAST({place} AS BIGINT)"
            parts.append(f"CASE WHEN {whole} = TRY_CAST({place} AS DOUBLE) THEN {whole} END AS position")
        table = connection.sql(f"SELECT {', '.join(parts)} FROM given").to_arrow_table()
    if len(table) != n_rows:
        raise ConfigError(
            f"{where} does not fit the tensors", got=f"{len(table):,} rows", expected=f"{n_rows:,}"
        )
    nulls = [
        f"{name} in {table[name].null_count:,} rows" for name in table.column_names if table[name].null_count
    ]
    if nulls:
        raise ConfigError(f"{where}: null or unreadable {', '.join(nulls)}", do="mend the table")
    entity, ids = code_ids(table["id"])
    given = {name: table[name].to_numpy() for name in table.column_names if name != "id"}
    position = given.get("position")
    if position is None:
        position = count_within(entity, given.get("time", np.zeros(n_rows, np.int64)))
    elif len(np.unique(np.stack([entity, position], axis=1), axis=0)) != n_rows:
        raise ConfigError(
            f"{where}: an entity has one position twice", do=f"mend the column {config.position}"
        )
    return Coordinates(entity, position, given.get("time", position)), ids


def count_within(
    entity: Int[np.ndarray, " rows"], time: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """Return each row's index within its entity, in order of time and then of the rows."""
    order = np.lexsort((time, entity))
    starts = np.flatnonzero(np.diff(entity[order], prepend=-1))
    within = np.arange(len(entity)) - np.repeat(starts, np.diff(np.append(starts, len(entity))))
    position = np.empty(len(entity), np.int64)
    position[order] = within
    return position
