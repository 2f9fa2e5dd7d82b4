"""Which rows exist: the commit records of every writer, the only truth about a store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sae.errors import StoreError

from .durable import run_all
from .places import Lock, LockedError, Place, TakenError
from .records import create_record, read_record, record_crc
from .schema import Description, Geometry, group_metadata

_ENDED = {"ended": True}


@dataclass(frozen=True)
class SplitBlock:
    """The rows of one split in one block: how many, from which shard on, and a checksum per file."""

    shard: int
    rows: int
    crcs: dict[str, list[int]]


@dataclass(frozen=True)
class Commit:
    """One block that exists.

    Attributes
    ----------
    block
        Its number within its writer.
    cursor
        Where the source stands after it.
    splits
        Where its rows are.
    extra_bytes, extra_crc
        Size and checksum of the file with its index and moments.
    revision
        Tells files of the same block apart: counted up by an erasure, and past what a dead writer left.
    """

    block: int
    cursor: Any
    splits: dict[str, SplitBlock]
    extra_bytes: int
    extra_crc: int
    revision: int = 0

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(part.rows for part in self.splits.values())

    @property
    def extra_name(self) -> str:
        """Name of the file with its index and moments."""
        return f"{self.block:08d}.{self.revision}.safetensors"

    @property
    def record_name(self) -> str:
        """Name of its record."""
        return record_name(self.block)

    def body(self) -> dict[str, Any]:
        """Return the record as plain values."""
        splits = {n: {"shard": s.shard, "rows": s.rows, "crcs": s.crcs} for n, s in self.splits.items()}
        extra = {"bytes": self.extra_bytes, "crc32c": self.extra_crc}
        return {
            "block": self.block,
            "revision": self.revision,
            "cursor": self.cursor,
            "splits": splits,
            "extra": extra,
        }

    @classmethod
    def of(cls, b: dict[str, Any]) -> Commit:
        """Return the commit that a record's body describes."""
        splits = {name: SplitBlock(**s) for name, s in b["splits"].items()}
        return cls(b["block"], b["cursor"], splits, b["extra"]["bytes"], b["extra"]["crc32c"], b["revision"])


def record_name(block: int) -> str:
    """Return the name of a block's commit record."""
    return f"{block:08d}.json"


def read_commits(writer: Place) -> list[Commit]:
    """Read all commits of one writer, in order.

    Raises
    ------
    StoreError
        One is damaged, or one is missing between two others.
    """
    folder = writer / "commits"
    numbers = sorted(int(name[:8]) for name in folder.sizes() if re.fullmatch(r"\d{8}\.json", name))
    if numbers != list(range(len(numbers))):
        gap = min(set(range(len(numbers))) - set(numbers))
        raise StoreError(
            f"{folder}/{gap:08d}.json is missing", do="restore it, or harvest again into a new place"
        )
    bodies = folder.map(lambda number: read_record(folder / record_name(number)), numbers)
    if bodies and bodies[-1] == _ENDED:
        bodies.pop()
    commits = [Commit.of(body) for body in bodies]
    for number, commit in enumerate(commits):
        if commit.block != number:
            raise StoreError(
                f"{folder}/{number:08d}.json is the record of another block", got=str(commit.block)
            )
    return commits


def write_commit(folder: Place, commit: Commit, lock: Lock) -> None:
    """Write the record of a block whose files are all durable: from now on its rows exist.

    Raises
    ------
    LockedError
        Another writer has taken over.
    """
    lock.check()
    try:
        create_record(folder / "commits" / commit.record_name, commit.body())
    except TakenError as error:
        raise LockedError(
            f"{folder} was taken over by another process",
            got=f"{commit.record_name} is there already",
            do="start again; it continues after the last commit",
        ) from error


def end_commits(folder: Place, commits: Sequence[Commit], lock: Lock) -> None:
    """Make sure that nobody commits any more: not even a writer that lost its lock and does not know yet.

    Where that can be, the next record's name is taken by one that says so.

    Raises
    ------
    LockedError
        Somebody has committed meanwhile.
    """
    if lock.final:
        return
    try:
        create_record(folder / "commits" / record_name(len(commits)), _ENDED)
    except TakenError as error:
        raise LockedError(f"{folder} is being written by another process", do="wait for it to end") from error


def end_rows(commits: Sequence[Commit], geometry: Geometry) -> dict[str, int]:
    """Return, per split, the number of rows of the writer's arrays, gaps included."""
    ends: dict[str, int] = {}
    for commit in commits:
        for name, part in commit.splits.items():
            ends[name] = max(ends.get(name, 0), part.shard * geometry.shard_rows + part.rows)
    return ends


def writer_paths(store: Place) -> Iterator[tuple[int, Place]]:
    """Yield number and folder of every writer, in order."""
    for name in store.folders():
        if re.fullmatch(r"w\d{4,}", name):
            yield int(name[1:]), store / name


def writer_path(store: Place, writer: int) -> Place:
    """Return the folder of a writer."""
    return store / f"w{writer:04d}"


def metadata(description: Description, commits: Sequence[Commit]) -> dict[str, dict[str, Any]]:
    """Return the zarr metadata of a writer's groups and arrays by file, as its commits have them."""
    files = {"zarr.json": group_metadata({})}
    for split, rows in end_rows(commits, description.geometry).items():
        files[f"{split}/zarr.json"] = files[f"{split}/acts/zarr.json"] = group_metadata({})
        for spec in description.arrays().values():
            files[f"{split}/{spec.path}/zarr.json"] = spec.metadata(rows, description.geometry)
    return files


def write_metadata(folder: Place, description: Description, commits: Sequence[Commit]) -> None:
    """Write the zarr metadata of a writer's groups and arrays, durably, where it has changed."""
    there = folder.sizes()
    tasks = []
    for name, content in metadata(description, commits).items():
        data = json.dumps(content, indent=1).encode()
        if there.get(name) != len(data) or (folder / name).read() != data:
            tasks.append(partial((folder / name).write, data))
    run_all(tasks)


@dataclass(frozen=True)
class Group:
    """One writer's part of a store: its number, its folder and what it has committed."""

    number: int
    folder: Place
    commits: list[Commit]

    def digest(self, blocks: int | None = None) -> int:
        """Return a checksum of all commit records, or of the first few."""
        return record_crc({"commits": [commit.body() for commit in self.commits[:blocks]]})


def read_groups(path: Place) -> list[Group]:
    """Read every writer's commits; StoreError if a record is damaged or missing."""
    return [Group(number, folder, read_commits(folder)) for number, folder in writer_paths(path)]


def split_rows(groups: list[Group]) -> dict[str, int]:
    """Return the rows per split, splits by name."""
    rows: dict[str, int] = {}
    for group in groups:
        for commit in group.commits:
            for name, part in commit.splits.items():
                rows[name] = rows.get(name, 0) + part.rows
    return dict(sorted(rows.items()))
