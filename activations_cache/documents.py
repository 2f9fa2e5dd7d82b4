"""Documents in text files or in a folder of `datasets`, one at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sae.errors import ConfigError


class Documents(NamedTuple):
    """Texts by number."""

    ids: list[str]
    """Name of each: the file, the file and line, or the row of the data set."""
    read: Callable[[int], str]


def open_documents(paths: Sequence[Path], document: Literal["file", "line"], column: str) -> Documents:
    """Open documents without reading them all into memory.

    Raises
    ------
    ConfigError
        A file is missing, there is no document, `datasets` is not installed, or its folder is not as expected.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ConfigError(f"source.path: nothing at {', '.join(missing)}", do="check the path")
    if len(paths) == 1 and paths[0].is_dir():
        found = _open_dataset(paths[0], column)
    elif any(path.is_dir() for path in paths):
        raise ConfigError(
            "source.path names several folders, or files and folders", expected="text files, or one folder"
        )
    else:
        found = _open_files(paths) if document == "file" else _open_lines(paths)
    if not found.ids:
        raise ConfigError(f"source.path: no document in {', '.join(map(str, paths))}")
    return found


def _open_files(paths: Sequence[Path]) -> Documents:
    return Documents(_names(paths), lambda i: _decode(paths[i].read_bytes(), paths[i]))


def _open_lines(paths: Sequence[Path]) -> Documents:
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, (path, name) in enumerate(zip(paths, _names(paths), strict=True)):
        start = 0
        with path.open("rb") as file:
            for line, content in enumerate(file):
                if content.strip():
                    ids.append(f"{name}:{line + 1}")
                    places.append((number, start, len(content)))
                start += len(content)
    at = np.array(places, np.int64).reshape(-1, 3)

    def read(i: int) -> str:
        number, start, size = at[i].tolist()
        with paths[number].open("rb") as file:
            file.seek(start)
            return _decode(file.read(size), paths[number]).rstrip("\r\n")

    return Documents(ids, read)


def _open_dataset(path: Path, column: str) -> Documents:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"source.path: {path} is a folder, and reading a data set needs the package `datasets`",
            do=f"pip install 'assay[datasets]', or for text files in it give a glob, such as {path}/*.txt",
        ) from error
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"source.path: {path} is a folder, but no data set",
            got=reason,
            expected="text files, or a folder that save_to_disk of `datasets` wrote",
            do=f"for the text files in it give a glob, such as {path}/*.txt",
        ) from error
    if isinstance(rows, dict):
        raise ConfigError(
            f"{path} holds several data sets",
            got=", ".join(rows),
            do=f"name one, such as {path}/{next(iter(rows))}",
        )
    if column not in rows.column_names:
        raise ConfigError(f"source.column: {path} has no {column}", expected=", ".join(rows.column_names))
    return Documents([str(i) for i in range(len(rows))], lambda i: str(rows[i][column] or ""))


def _names(paths: Sequence[Path]) -> list[str]:
    """Return file names, or whole paths where a name occurs twice."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8", got=str(error)) from error
