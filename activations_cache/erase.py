"""Remove entities from a complete store: the blocks that hold them are written anew, without them.

The new store is put together beside the old one: hard links to every file that stays as it is, new files for
the blocks concerned, the index, the moments, the ids and the manifest. When it is whole, old and new change
places in one step and the old one is removed. So a crash leaves the old store or the new one, never a mix;
what else it leaves lies beside the store, and the next call removes it. New files never take the name of an
old one with other rows, so that whoever is reading meanwhile gets an error instead of somebody else's rows.

Files are unlinked, not overwritten: copies, backups and the free blocks of a disk are not this module's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from jaxtyping import Int64

from sae.errors import StoreError

from . import sql
from .block import write_block
from .commits import Commit, Group, SplitBlock, end_rows, write_metadata, writer_paths
from .durable import PARTIAL, exchange, sync_folder
from .places import LocalPlace, Location, Place, place_of
from .records import write_record
from .seal import FILES, finish
from .store import ActivationStore
from .verify import beside_store, shard_files

_COLUMNS = ("id", "entity", "entity_id")


class ErasureReport(NamedTuple):
    """What an erasure did.

    Attributes
    ----------
    requested
        Distinct ids that were asked for.
    entities
        How many of them the store held; it holds none of them now.
    rows, blocks
        Rows that went, and blocks that were written anew.
    completed
        Whether an earlier erasure had been interrupted and its remains were removed first.
    """

    requested: int
    entities: int
    rows: int
    blocks: int
    completed: bool

    @property
    def text(self) -> str:
        """One sentence for the screen."""
        said = f"{self.entities:,} of {self.requested:,} entities erased: "
        said += f"{self.rows:,} rows in {self.blocks:,} blocks"
        absent = self.requested - self.entities
        said += f"; the store does not hold the other {absent:,}" if absent else ""
        return said + ("; what an interrupted erasure had left was removed" if self.completed else "")


def erase(store: Location, entities: Sequence[str]) -> ErasureReport:
    """Remove every trace of some entities from a complete store; ids that it does not hold are only counted.

    Parameters
    ----------
    store
        The store. Beside it there has to be room for the blocks concerned.
    entities
        The user's ids; codes as text where the store has no ids.

    Raises
    ------
    StoreError
        There is no complete store, it is damaged, another process changes it, or it lies on an object store.
    """
    place = place_of(store)
    if not isinstance(place, LocalPlace):
        raise StoreError(
            f"{place} cannot be changed where it is: an object store has no step that exchanges two stores",
            do="copy it into a folder, erase there and check it with `assay inspect --verify`; then remove the "
            "prefix, with all versions that the bucket keeps, and copy the folder back",
        )
    path = place.path.expanduser().resolve()
    place = LocalPlace(path)
    beside, aside = beside_store(path)
    wanted = set(entities)
    _put_back(path, beside, aside)
    with ExitStack() as locks:
        if not (path / "zarr.json").exists():
            raise StoreError(f"{store} is not an activation store", got=f"no {path / 'zarr.json'}")
        for held in (place, *(folder for _, folder in writer_paths(place))):
            locks.enter_context((held / "lock").lock())
        completed = beside.exists()
        _remove(beside)
        old = ActivationStore.open(path)
        codes, ids = _find(old, wanted)
        if len(codes) == 0:
            return ErasureReport(len(wanted), 0, 0, 0, completed)
        blocks = old.blocks_with(codes)
        _link_rest(old, beside, blocks)
        groups = _rewrite(old, beside, blocks, codes)
        rows = old.n_rows - sum(commit.rows for group in groups for commit in group.commits)
        entry = {"date": datetime.now(UTC).date().isoformat(), "entities": len(codes), "rows": rows}
        erasures = (*old.description.erasures, entry)
        finish(LocalPlace(beside), replace(old.description, erasures=erasures), groups, ids)
        for folder in (beside, *(p for p in beside.rglob("*") if p.is_dir())):
            sync_folder(folder)
        ActivationStore.open(beside)
        exchange(path, beside)
        _remove(beside)
        return ErasureReport(len(wanted), len(codes), rows, len(blocks), completed)


def read_ids(file: Path, *, column: str | None = None) -> list[str]:
    """Read entity ids as they stand, spaces included: one per line, or a column of a CSV or Parquet file.

    Parameters
    ----------
    file
        Text; `.csv`, `.tsv` and `.parquet` are read as such.
    column
        Which column; by default `id`, `entity` or `entity_id`, or the only one of a Parquet file: that of a CSV file may be
        named by an id that stands in the first line.

    Raises
    ------
    StoreError
        The file cannot be read, has no such column, lists nobody, or has an empty id.
    """
    try:
        if file.suffix.lower() == ".parquet":
            ids = _column(pq.read_table(file), file, column, only_one_will_do=True)
        elif file.suffix.lower() in (".csv", ".tsv"):
            parse = pcsv.ParseOptions(delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            names = pcsv.open_csv(file, parse_options=parse).schema.names
            # ids are text: 007 is not 7
            options = pcsv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
            )
            table = pcsv.read_csv(file, parse_options=parse, convert_options=options)
            ids = _column(table, file, column, only_one_will_do=False)
        else:
            # str.splitlines would take an id apart where it holds a separator of other alphabets
            lines = file.read_bytes().decode("utf-8-sig").split("\n")
            ids = [line.removesuffix("\r") for line in lines if line.strip()]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise StoreError(f"{file} cannot be read", got=str(error).splitlines()[0]) from error
    if not ids or None in ids or "" in ids:
        raise StoreError(
            f"{file} does not list entities",
            got=f"{sum(not i for i in ids)} empty ids" if ids else "no ids",
            expected="one id per line, or a column of ids",
        )
    return ids


def _column(table: pa.Table, file: Path, column: str | None, *, only_one_will_do: bool) -> list[str]:
    names = table.column_names
    found = [column] if column else [name for name in _COLUMNS if name in names]
    if not found and only_one_will_do and len(names) == 1:
        found = names
    if not found or found[0] not in names:
        raise StoreError(
            f"{file} has no column {column!r}"
            if column
            else f"{file} does not say which column holds the ids",
            got=", ".join(names),
            expected=", ".join(_COLUMNS),
            do="name the column (--column), or give a text file with one id per line",
        )
    if pa.types.is_nested(table[found[0]].type):
        raise StoreError(f"{file}: {found[0]} holds no ids", got=str(table[found[0]].type))
    # as the panel's and the events' ids became text: 3.0 and times have other forms elsewhere
    with sql.connect(threads=1, memory_limit="2GB") as connection:
        connection.register("listed", table.select(found[:1]))
        rows = connection.execute(f"SELECT {sql.id_of(found[0])} FROM listed").fetchall()
    return [row[0] for row in rows]


def _find(store: ActivationStore, wanted: set[str]) -> tuple[Int64[np.ndarray, " entities"], pa.Table | None]:
    """Return the codes of the ids that the store holds, and its table of ids without them."""
    table = store.entity_ids()
    if table is None:
        codes = store.entity_codes()
        return codes[np.array([str(code) in wanted for code in codes.tolist()], bool)], None
    # plain columns: a dictionary would keep the ids that no row has any more
    plain = {
        name: table[name].cast(table[name].type.value_type)
        if pa.types.is_dictionary(table[name].type)
        else table[name]
        for name in table.column_names
    }
    table = pa.table(plain)
    gone = pc.is_in(table["id"].cast(pa.string()), value_set=pa.array(sorted(wanted), pa.string()))
    return table.filter(gone)["entity"].to_numpy().astype(np.int64), table.filter(pc.invert(gone))


def _link_rest(store: ActivationStore, beside: Path, blocks: Sequence[tuple[int, int]]) -> None:
    """Put together beside the store what stays as it is."""
    old, concerned = Path(str(store.path)), {writer for writer, _ in blocks}
    names = store.path.sizes()
    anew = {*FILES, "manifest.json", "zarr.json"}
    for group in store.groups:
        gone = [group.commits[block] for writer, block in blocks if writer == group.number]
        files = [name for name, *_ in shard_files(store.description, gone)]
        files += [f"blocks/{commit.extra_name}" for commit in gone]
        files += [f"commits/{commit.record_name}" for commit in gone]
        anew |= {f"{group.folder.name}/{name}" for name in files}
        if group.number in concerned:
            anew |= {n for n in names if n.startswith(f"{group.folder.name}/") and n.endswith("/zarr.json")}
    made: set[Path] = set()
    for name in (n for n in names if n not in anew and not n.endswith(PARTIAL)):
        path, target = old / name, beside / name
        if target.parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(target.parent)
        try:
            os.link(path, target)
        except OSError:
            # a file system without hard links
            shutil.copy2(path, target)


def _rewrite(
    store: ActivationStore,
    beside: Path,
    blocks: Sequence[tuple[int, int]],
    codes: Int64[np.ndarray, " entities"],
) -> list[Group]:
    """Write the blocks concerned, their records and the zarr metadata around them; return all writers."""
    groups = []
    for group in store.groups:
        folder, commits = LocalPlace(beside / group.folder.name), list(group.commits)
        mine = [block for writer, block in blocks if writer == group.number]
        for block in mine:
            ends = end_rows([*group.commits, *commits], store.description.geometry)
            commits[block] = _rewrite_block(
                store, group, commits[block], folder=folder, codes=codes, ends=ends
            )
            write_record(folder / "commits" / commits[block].record_name, commits[block].body())
        if mine:
            write_metadata(folder, store.description, commits)
        groups.append(Group(group.number, folder, commits))
    return groups


def _rewrite_block(
    store: ActivationStore,
    group: Group,
    commit: Commit,
    *,
    folder: Place,
    codes: Int64[np.ndarray, " entities"],
    ends: dict[str, int],
) -> Commit:
    """Write the rows of a block that stay, in the order they had, into shards that no file ever was."""
    geometry, specs = store.description.geometry, store.description.arrays()
    total = commit.rows
    rows = {name: np.empty((total, *spec.row_shape), spec.dtype) for name, spec in specs.items()}
    orders: dict[str, Int64[np.ndarray, " n"]] = {}
    starts: dict[str, SplitBlock] = {}
    at = 0
    for split, part in commit.splits.items():
        numbers = part.shard * geometry.shard_rows + np.arange(part.rows)
        for name, out in rows.items():
            store.reader(group.number, split, name).read_rows(numbers, out[at : at + part.rows])
        kept = at + np.flatnonzero(~np.isin(rows["entity"][at : at + part.rows], codes))
        at += part.rows
        if len(kept):
            orders[split] = kept
            starts[split] = SplitBlock(geometry.shards_of(ends[split]), len(kept), {})
    changed = replace(commit, splits=starts, revision=commit.revision + 1)
    return write_block(folder, store.description, rows, orders, commit=changed)


def _put_back(path: Path, beside: Path, aside: Path) -> None:
    """Finish an exchange in several steps that was interrupted between them."""
    if aside.exists() and not path.exists():
        beside.replace(path)
    if aside.exists():
        _remove(beside)
        aside.replace(beside)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
        sync_folder(folder.parent)
