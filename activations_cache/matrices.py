"""Matrices in files, read a range of rows at a time: npy, safetensors, Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float

from sae.errors import ConfigError

_INDEX = re.compile(r"__index_level_\d+__")


class Matrix(NamedTuple):
    """Rows of numbers in a file."""

    rows: int
    width: int
    read: Callable[[int, int], Float[np.ndarray, "rows width"]]
    """From row, to row -> float32."""


def open_matrix(path: Path, key: str | None = None) -> Matrix:
    """Open a file's matrix without reading its rows.

    Parameters
    ----------
    key
        Tensor of a safetensors file, or column of lists of a Parquet file; needed where there are several.

    Raises
    ------
    ConfigError
        The file is missing, unreadable, of an unknown format, or holds no matrix of floating-point numbers.
    """
    openers = {".npy": _open_npy, ".safetensors": _open_safetensors, ".parquet": _open_parquet}
    opener = openers.get(path.suffix.lower())
    if opener is None:
        raise ConfigError(f"cannot tell what {path} is", expected=".npy, .safetensors or .parquet")
    if not path.is_file():
        raise ConfigError(f"no file at {path}", do="check source.path")
    try:
        return opener(path, key)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path} cannot be read", got=reason) from error


def _open_npy(path: Path, key: str | None) -> Matrix:
    if key is not None:
        raise ConfigError(
            f"{path} holds one array, without a name", got=f"source.key={key}", do="leave it out"
        )
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    n_rows, width = _check(path, rows.shape, rows.dtype.kind == "f", str(rows.dtype))
    return Matrix(n_rows, width, lambda a, b: np.asarray(rows[a:b], np.float32))


def _open_safetensors(path: Path, key: str | None) -> Matrix:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    name = _choose(path, list(file.keys()), key, "tensor")
    part = file.get_slice(name)
    dtype = str(part.get_dtype())
    # torch, because numpy has no bfloat16
    n_rows, width = _check(path, tuple(part.get_shape()), dtype in ("F64", "F32", "F16", "BF16"), dtype)

    def read(a: int, b: int) -> np.ndarray:
        found: np.ndarray = part[a:b].to(torch.float32).numpy()
        return found

    return Matrix(n_rows, width, read)


def _open_parquet(path: Path, key: str | None) -> Matrix:
    file = pq.ParquetFile(path, memory_map=True)
    schema = file.schema_arrow
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    lists = [f.name for f in schema if any(is_kind(f.type) for is_kind in kinds)]
    rows = file.metadata.num_rows
    if lists or key is not None:
        names = [_choose(path, lists, key, "column of lists")]
        value = schema.field(names[0]).type.value_type
        width = len(file.read_row_group(0, columns=names).column(0)[0]) if rows else 0
    else:
        # pandas writes its index beside the columns, and others keep it
        index = (schema.pandas_metadata or {}).get("index_columns", [])
        fields = [f for f in schema if f.name not in index and not _INDEX.fullmatch(f.name)]
        names, width, value = [f.name for f in fields], len(fields), fields[0].type if fields else pa.null()
        mixed = [f.name for f in fields if not pa.types.is_floating(f.type)]
        if mixed:
            raise ConfigError(
                f"{path}: columns that are no floating-point numbers",
                got=", ".join(mixed),
                do="name one with source.key",
            )
    _check(path, (rows, width), pa.types.is_floating(value), str(value))
    reader = _RowGroups(path, file, names, width)
    return Matrix(rows, width, reader.read)


class _RowGroups:
    """Reads rows across the row groups of a Parquet file and keeps the last group, since reads go forward."""

    def __init__(self, path: Path, file: pq.ParquetFile, names: list[str], width: int) -> None:
        self.path, self.file, self.names, self.width = path, file, names, width
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.kept: tuple[int, Any] = (-1, None)

    def read(self, a: int, b: int) -> np.ndarray:
        first, last = np.searchsorted(self.starts, [a, b - 1], side="right") - 1
        parts = []
        for group in range(int(first), int(last) + 1):
            start = int(self.starts[group])
            parts.append(self._group(group)[max(a - start, 0) : b - start])
        return np.concatenate(parts)

    def _group(self, group: int) -> np.ndarray:
        if self.kept[0] != group:
            table = self.file.read_row_group(group, columns=self.names)
            self.kept = (group, self._matrix(table))
        rows: np.ndarray = self.kept[1]
        return rows

    def _matrix(self, table: pa.Table) -> np.ndarray:
        if any(column.null_count for column in table.columns):
            raise ConfigError(f"{self.path} has null values", do="write a number in every place")
        if len(table.columns) == 1 and not pa.types.is_floating(table.schema.types[0]):
            flat = table.column(0).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if len(flat) != len(table) * self.width:
                raise ConfigError(
                    f"{self.path}: the lists differ in length", expected=f"{self.width} numbers each"
                )
            matrix: np.ndarray = flat.reshape(len(table), self.width).astype(np.float32)
            return matrix
        return np.stack([column.to_numpy().astype(np.float32) for column in table.columns], axis=1)


def _choose(path: Path, names: list[str], key: str | None, what: str) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key is not None and key in names:
        return key
    got = f"source.key={key}" if key is not None else "no source.key"
    raise ConfigError(
        f"{path}: which {what} is meant is not clear", got=got, expected=" or ".join(names) or "one"
    )


def _check(path: Path, shape: tuple[int, ...], floating: bool, dtype: str) -> tuple[int, int]:
    if len(shape) != 2 or not floating or 0 in shape:
        raise ConfigError(
            f"{path} holds no activations",
            got=f"{dtype} of shape {tuple(shape)}",
            expected="floating-point numbers of shape (rows, d_in)",
            do="save one row per vector, with who and when in source.coordinates",
        )
    return shape[0], shape[1]
