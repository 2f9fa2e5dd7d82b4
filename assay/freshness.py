"""Whether a stage's output is still what it would write: recorded inputs against today's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae.errors import UserError

FORMAT_VERSION = 1
Inputs = dict[str, Any]


def read_record(path: Path) -> dict[str, Any]:
    """Return what run.json holds.

    Raises
    ------
    UserError
        It cannot be read, or is no record of a run.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data["stages"], dict):
            raise TypeError("its stages are no mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, or no record of a run",
            got=str(error) or type(error).__name__,
            do="restore it from a copy, or use another run folder (out=DIR)",
        ) from error
    return dict(data)


class RunRecord:
    """run.json: the resolved configuration, and for every stage what it read and how long it took."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.data: dict[str, Any] = {"format_version": FORMAT_VERSION, "stages": {}}
        if self.path.is_file():
            data = read_record(self.path)
            if data.get("format_version") != FORMAT_VERSION:
                raise UserError(
                    f"{self.path} was written by another version",
                    got=str(data.get("format_version")),
                    expected=str(FORMAT_VERSION),
                    do="use another run folder (out=DIR)",
                )
            self.data = data

    def stage(self, name: str) -> dict[str, Any]:
        """Return what is recorded of a stage; empty where nothing is."""
        found: dict[str, Any] = self.data["stages"].get(name, {})
        return found

    def update(self, name: str, **values: Any) -> None:
        """Record something of a stage, durably."""
        self.data["stages"].setdefault(name, {}).update(values)
        self.write()

    def write(self) -> None:
        """Write run.json beside itself and rename."""
        part = self.path.with_name(".run.json.part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(self.data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)


def fingerprint(inputs: Inputs) -> str:
    """Return a hash over everything that a stage reads."""
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_hash(path: Path) -> str:
    """Return a hash over a file's content; a folder's is over its files' names and contents."""
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def file_hashes(files: Sequence[Path]) -> Inputs:
    """Return the files' hashes by name, so that a run may be moved; files of one name are numbered."""
    names = [path.name for path in files]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    labels = [
        f"{name} {n + 1}" if names.count(name) > 1 else name for name, n in zip(names, before, strict=True)
    ]
    return {f"file {label}": file_hash(path) for label, path in zip(labels, files, strict=True)}


def changes(before: Inputs, now: Inputs) -> list[str]:
    """Return what differs between two sets of inputs, by path: 'label.min_skill 0.25 -> 0.3'."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "nothing"), new.get(key, "nothing")
        if a != b:
            out.append(_changed(key, a, b) if key.startswith(("file ", "after ")) else f"{key} {a} -> {b}")
    return out


def _changed(key: str, before: Any, now: Any) -> str:
    """Return what happened to something that is known by its hash."""
    return (
        f"{key} is {'new' if before == 'nothing' else 'gone'}"
        if "nothing" in (before, now)
        else f"{key} changed"
    )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(tree) if isinstance(tree, list) else tree


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for one process.

    Raises
    ------
    UserError
        It cannot be written, or another process works in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be a run folder",
            got=error.strerror or str(error),
            do="name another one (out=DIR)",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process works in {folder}", do="wait for it, or use another folder (out=DIR)"
            ) from error
        yield
