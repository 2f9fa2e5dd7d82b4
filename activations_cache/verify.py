"""Is a store whole? Sizes and records, cheap enough for every `open`; checksums of every byte on request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae.errors import StoreError

from .commits import Commit, Group, metadata
from .index import read_block
from .places import Place
from .schema import ArraySpec, Description
from .shards import shard_problems

_SHOWN = 20


def raise_problems(path: Place, problems: Sequence[str]) -> None:
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
    description: Description, commits: Sequence[Commit]
) -> Iterator[tuple[str, ArraySpec, int, int]]:
    """Yield every shard file that a writer's commits name: its name in the folder, array, rows, checksum."""
    size = description.geometry.shard_rows
    for commit in commits:
        for split, part in commit.splits.items():
            for name, spec in description.arrays().items():
                for i, crc in enumerate(part.crcs[name]):
                    file = f"{split}/{spec.path}/{spec.shard_name(part.shard + i)}"
                    yield file, spec, min(size, part.rows - i * size), crc


def size_problems(folder: Place, description: Description, commits: Sequence[Commit]) -> Iterator[str]:
    """Yield what is wrong with the sizes of one writer's files, without reading any of them."""
    found = folder.sizes()
    wanted = {
        name: description.geometry.shard_bytes(rows, spec.row_bytes)
        for name, spec, rows, _ in shard_files(description, commits)
    }
    wanted |= {f"blocks/{commit.extra_name}": commit.extra_bytes for commit in commits}
    for name, want in wanted.items():
        if name not in found:
            yield f"{folder / name} is missing"
        elif found[name] != want:
            yield f"{folder / name} has the wrong size: {found[name]} bytes, expected {want}"


def metadata_problems(folder: Place, description: Description, commits: Sequence[Commit]) -> list[str]:
    """Return which zarr metadata of one writer do not say what its commits say."""

    def problem(name: str, content: dict[str, Any]) -> str:
        try:
            found = json.loads((folder / name).read())
        except StoreError as error:
            return str(error)
        except ValueError:
            return f"{folder / name} is damaged: it is not JSON"
        return (
            "" if found == content else f"{folder / name} is damaged: it does not describe what was committed"
        )

    found = folder.map(lambda item: problem(*item), metadata(description, commits).items())
    return [text for text in found if text]


def checksum_problems(folder: Place, description: Description, commits: Sequence[Commit]) -> list[str]:
    """Read every byte of one writer's files and return what is wrong."""

    def of_shard(file: tuple[str, ArraySpec, int, int]) -> list[str]:
        name, spec, rows, crc = file
        return list(shard_problems(folder / name, rows, crc, spec=spec, geometry=description.geometry))

    def of_block(commit: Commit) -> list[str]:
        try:
            read_block(folder, commit)
        except StoreError as error:
            return [str(error)]
        return []

    found = folder.map(of_shard, shard_files(description, commits)) + folder.map(of_block, commits)
    return [text for problems in found for text in problems]


def manifest_problems(path: Place, manifest: Mapping[str, Any], groups: list[Group]) -> list[str]:
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
        got = file.size()
        if got is None:
            problems.append(f"{file} is missing")
        elif got != size:
            problems.append(f"{file} has the wrong size: {got} bytes, expected {size}")
    return problems
