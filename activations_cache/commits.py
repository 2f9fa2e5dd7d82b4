"""Which rows exist: the commit records of every writer, the only truth about a store."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sae.errors import StoreError

from .durable import read_record, record_crc, run_all, write_file
from .schema import Description, Geometry, group_metadata


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
        How often it was rewritten (by an erasure).
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
        return f"{self.block:08d}.json"

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
    def read(cls, path: Path) -> Commit:
        """Read one commit record; StoreError if it is missing or damaged."""
        b = read_record(path)
        splits = {name: SplitBlock(**s) for name, s in b["splits"].items()}
        return cls(b["block"], b["cursor"], splits, b["extra"]["bytes"], b["extra"]["crc32c"], b["revision"])


def read_commits(writer: Path) -> list[Commit]:
    """Read all commits of one writer, in order.

    Raises
    ------
    StoreError
        One is damaged, or one is missing between two others.
    """
    folder = writer / "commits"
    names = {e.name for e in os.scandir(folder)} if folder.is_dir() else set()
    numbers = sorted(int(name[:8]) for name in names if re.fullmatch(r"\d{8}\.json", name))
    if numbers != list(range(len(numbers))):
        gap = min(set(range(len(numbers))) - set(numbers))
        raise StoreError(
            f"{folder}/{gap:08d}.json is missing", do="restore it, or harvest again into a new place"
        )
    commits = [Commit.read(folder / f"{number:08d}.json") for number in numbers]
    for number, commit in enumerate(commits):
        if commit.block != number:
            raise StoreError(
                f"{folder}/{number:08d}.json is the record of another block", got=str(commit.block)
            )
    return commits


def end_rows(commits: Sequence[Commit], geometry: Geometry) -> dict[str, int]:
    """Return, per split, the number of rows of the writer's arrays, gaps included."""
    ends: dict[str, int] = {}
    for commit in commits:
        for name, part in commit.splits.items():
            ends[name] = max(ends.get(name, 0), part.shard * geometry.shard_rows + part.rows)
    return ends


def writer_paths(store: Path) -> Iterator[tuple[int, Path]]:
    """Yield number and folder of every writer, in order."""
    if store.is_dir():
        for path in sorted(store.iterdir()):
            if re.fullmatch(r"w\d{4,}", path.name) and path.is_dir():
                yield int(path.name[1:]), path


def writer_path(store: Path, writer: int) -> Path:
    """Return the folder of a writer."""
    return store / f"w{writer:04d}"


def metadata(folder: Path, description: Description, commits: Sequence[Commit]) -> dict[Path, dict[str, Any]]:
    """Return the zarr metadata of a writer's groups and arrays by path, as its commits have them."""
    files = {folder: group_metadata({})}
    for split, rows in end_rows(commits, description.geometry).items():
        files[folder / split] = files[folder / split / "acts"] = group_metadata({})
        for spec in description.arrays().values():
            files[folder / split / spec.path] = spec.metadata(rows, description.geometry)
    return {place / "zarr.json": content for place, content in files.items()}


def write_metadata(folder: Path, description: Description, commits: Sequence[Commit]) -> None:
    """Write the zarr metadata of a writer's groups and arrays, durably, where it has changed."""
    tasks = []
    for path, content in metadata(folder, description, commits).items():
        data = json.dumps(content, indent=1).encode()
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            tasks.append(partial(write_file, path, data))
    run_all(tasks)


@dataclass(frozen=True)
class Group:
    """One writer's part of a store: its number, its folder and what it has committed."""

    number: int
    folder: Path
    commits: list[Commit]

    def digest(self, blocks: int | None = None) -> int:
        """Return a checksum of all commit records, or of the first few."""
        return record_crc({"commits": [commit.body() for commit in self.commits[:blocks]]})


def read_groups(path: Path) -> list[Group]:
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
