"""Is a store whole? Sizes and records, cheap enough for every `open`; checksums of every byte on request."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae.errors import StoreError

from .commits import Commit, Group, metadata
from .index import read_block
from .schema import ArraySpec, Description
from .shards import shard_problems

_SHOWN = 20


def raise_problems(path: Path, problems: Sequence[str]) -> None:
    """Raise one StoreError that lists all problems, or nothing if there are none."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "\n".join(f"  {problem}" for problem in [*problems[:_SHOWN], *more])
        raise StoreError(
            f"{path} is damaged: {len(problems)} problem(s)\n{lines}",
            do="restore these files from a copy, or harvest again into another place",
        )


def beside_store(path: Path) -> tuple[Path, Path]:
    """Return the names beside a store that an erasure uses while it works; a crash may leave them."""
    return path.with_name(path.name + ".erasing"), path.with_name(path.name + ".exchanged")


def shard_files(
    folder: Path, description: Description, commits: Sequence[Commit]
) -> Iterator[tuple[Path, ArraySpec, int, int]]:
    """Yield every shard file that commits name: path, array, rows, checksum."""
    size = description.geometry.shard_rows
    for commit in commits:
        for split, part in commit.splits.items():
            for name, spec in description.arrays().items():
                for i, crc in enumerate(part.crcs[name]):
                    path = folder / split / spec.path / spec.shard_name(part.shard + i)
                    yield path, spec, min(size, part.rows - i * size), crc


def size_problems(folder: Path, description: Description, commits: Sequence[Commit]) -> Iterator[str]:
    """Yield what is wrong with the sizes of one writer's files, without reading any of them."""
    listed: dict[Path, dict[str, int]] = {}

    def problem(path: Path, want: int) -> Iterator[str]:
        if path.parent not in listed:
            entries = os.scandir(path.parent) if path.parent.is_dir() else ()
            listed[path.parent] = {entry.name: entry.stat().st_size for entry in entries}
        got = listed[path.parent].get(path.name)
        if got is None:
            yield f"{path} is missing"
        elif got != want:
            yield f"{path} has the wrong size: {got} bytes, expected {want}"

    for path, spec, rows, _ in shard_files(folder, description, commits):
        yield from problem(path, description.geometry.shard_bytes(rows, spec.row_bytes))
    for commit in commits:
        yield from problem(folder / "blocks" / commit.extra_name, commit.extra_bytes)


def metadata_problems(folder: Path, description: Description, commits: Sequence[Commit]) -> Iterator[str]:
    """Yield which zarr metadata of one writer do not say what its commits say."""
    for path, content in metadata(folder, description, commits).items():
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            yield f"{path} is missing"
        except ValueError:
            yield f"{path} is damaged: it is not JSON"
        else:
            if found != content:
                yield f"{path} is damaged: it does not describe what was committed"


def checksum_problems(folder: Path, description: Description, commits: Sequence[Commit]) -> Iterator[str]:
    """Read every byte of one writer's files and yield what is wrong."""
    for path, spec, rows, crc in shard_files(folder, description, commits):
        yield from shard_problems(path, rows, crc, spec=spec, geometry=description.geometry)
    for commit in commits:
        try:
            read_block(folder, commit)
        except StoreError as error:
            yield str(error)


def manifest_problems(path: Path, manifest: Mapping[str, Any], groups: list[Group]) -> list[str]:
    """Return where a store is not what its manifest says, sizes and records only."""
    found = {group.folder.name: group for group in groups}
    problems = []
    for name, entry in manifest["writers"].items():
        if name not in found:
            problems.append(f"{path / name} is missing")
        elif len(found[name].commits) != entry["blocks"]:
            last = path / name / "commits" / f"{entry['blocks'] - 1:08d}.json"
            problems.append(
                f"{last} is missing, or others follow it: {len(found[name].commits)} of {entry['blocks']}"
            )
        elif found[name].digest() != entry["crc32c"]:
            problems.append(f"{path / name / 'commits'}: the records are not those that were sealed")
    for name, (size, _) in manifest["files"].items():
        file = path / name
        if not file.exists():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{file} has the wrong size: {file.stat().st_size} bytes, expected {size}")
    return problems
