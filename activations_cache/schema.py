"""What an activation store looks like on disk: its layout in rows, its names and its metadata.

    STORE/zarr.json                          root group; its attributes say what the store holds
    STORE/w0000/lock                         held by the writer of this group
    STORE/w0000/fit/{entity,position,time}   int64 [rows]
    STORE/w0000/fit/acts/layers.2            float32 | float16 | uint16 (bfloat16) [rows, d_in]
    STORE/w0000/blocks/*.safetensors         per block: moments, and its rows in order of (entity, position)
    STORE/w0000/commits/00000000.json        written last; only rows that a commit names exist
    STORE/{index,moments}.safetensors        of the whole store, written by `seal`
    STORE/entities.parquet                   entity code -> the user's id
    STORE/manifest.json                      what a complete store consists of

A block starts at a shard boundary of each split's arrays, so row numbers have gaps; a gap reads as entity -1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal
from urllib.parse import quote, unquote

import numpy as np
from pydantic import Field

from sae.config import Config
from sae.errors import ConfigError, StoreError

from .places import Place
from .records import record_crc

FORMAT_VERSION = 1
COLUMNS = ("entity", "position", "time")
STORED_DTYPE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
MISSING_CHUNK = 2**64 - 1

_CHUNK_BYTES = 2 << 20
_SHARD_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 30
_BLOCK_ROWS = 1 << 18


class StoreLayout(Config):
    """How activations are laid out on disk."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format on disk; half the bytes for the 16-bit ones, and an overflow stops the harvest."""
    chunk_rows: int = Field(default=0, ge=0)
    """Rows read and checked at once; 0 = a power of two of at most 2 MiB of the widest hook."""
    shard_rows: int = Field(default=0, ge=0)
    """Rows of one file, a multiple of chunk_rows; 0 = at most 32 MiB of the widest hook."""
    block_rows: int = Field(default=0, ge=0)
    """Rows buffered, shuffled and committed at once; 0 = 262144, less where all hooks together pass 1 GiB."""
    shuffle: bool = True
    """Whether rows are shuffled within their block; without it, batches of a window hold few entities."""
    covariance: bool = False
    """Whether moments hold the covariance of each hook as well: d_in x d_in float64 per block, and much work."""
    retain_until: date | None = None
    """Day after which the store has to be deleted; noted in the store, nothing is deleted by itself."""
    data_licence: str = ""
    """Licence or legal ground under which the data behind the activations may be used."""

    def geometry(self, hooks: Mapping[str, int]) -> Geometry:
        """Choose what was left at 0 and check the rest.

        Raises
        ------
        ConfigError
            shard_rows is not a multiple of chunk_rows.
        """
        item = np.dtype(STORED_DTYPE[self.dtype]).itemsize
        widest, total = max(hooks.values()) * item, sum(hooks.values()) * item
        block = self.block_rows or min(_BLOCK_ROWS, max(4096, _power_of_two(_BLOCK_BYTES // total)))
        chunk = self.chunk_rows or max(
            1, min(_power_of_two(_CHUNK_BYTES // widest), _power_of_two(block // 64))
        )
        auto = max(
            1, min(_power_of_two(_SHARD_BYTES // (chunk * widest)), _power_of_two(block // (4 * chunk)))
        )
        shard = self.shard_rows or chunk * auto
        if shard % chunk:
            raise ConfigError("shard_rows is not a multiple of chunk_rows", got=f"{shard} and {chunk}")
        return Geometry(chunk_rows=chunk, shard_rows=shard, block_rows=block)


@dataclass(frozen=True)
class Geometry:
    """Rows per chunk, per shard (file) and per block (commit)."""

    chunk_rows: int
    shard_rows: int
    block_rows: int

    @property
    def chunks_per_shard(self) -> int:
        """Chunks that one file can hold."""
        return self.shard_rows // self.chunk_rows

    def shards_of(self, rows: int) -> int:
        """Files that a block with so many rows of one split takes up."""
        return -(-rows // self.shard_rows)

    def chunks_of(self, rows: int) -> int:
        """Chunks that so many rows of one file take up, the last one padded."""
        return -(-rows // self.chunk_rows)

    def shard_bytes(self, rows: int, row_bytes: int) -> int:
        """Size of a file that holds `rows` rows: whole chunks and the index, each with a checksum."""
        return self.chunks_of(rows) * (self.chunk_rows * row_bytes + 4) + 16 * self.chunks_per_shard + 4


@dataclass(frozen=True)
class ArraySpec:
    """One array of a writer and split: path below the split, number format, width (0 = flat)."""

    path: str
    dtype: str
    width: int
    logical_dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return max(self.width, 1) * np.dtype(self.dtype).itemsize

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return (self.width,) if self.width else ()

    @property
    def fill(self) -> int:
        """What a gap reads as."""
        return 0 if self.width else -1

    def shard_name(self, shard: int) -> str:
        """File name of a shard."""
        return f"c.{shard}.0" if self.width else f"c.{shard}"

    def metadata(self, rows: int, geometry: Geometry) -> dict[str, Any]:
        """Return the zarr v3 metadata of the array."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [geometry.chunk_rows, *self.row_shape],
            "codecs": [little, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        grid = {"chunk_shape": [geometry.shard_rows, *self.row_shape]}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *self.row_shape],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": float(self.fill) if self.dtype.startswith("float") else self.fill,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"logical_dtype": self.logical_dtype},
            "dimension_names": ["row", "dimension"] if self.width else ["row"],
        }


@dataclass(frozen=True)
class Description:
    """What a store holds: the attributes of its root group.

    Attributes
    ----------
    hooks
        Width of each hook.
    dtype
        Logical number format: float32, float16 or bfloat16.
    geometry
        Rows per chunk, shard and block.
    seed, run_length
        Of the shuffling at write time; runs of `run_length` consecutive rows of an entity stay together.
    provenance
        What the caller says about model, data and code.
    shuffle
        Whether rows were shuffled within their block.
    covariance
        Whether moments hold the covariance.
    retain_until, data_licence
        ISO date or empty; licence or empty.
    sealed
        Whether the store is complete.
    splits
        Rows per split; empty until the store is sealed.
    erasures
        One entry per erasure: when, how many entities and rows.
    """

    hooks: dict[str, int]
    dtype: str
    geometry: Geometry
    seed: int
    run_length: int
    provenance: dict[str, Any]
    shuffle: bool = True
    covariance: bool = False
    retain_until: str = ""
    data_licence: str = ""
    sealed: bool = False
    splits: dict[str, int] = field(default_factory=dict)
    erasures: tuple[dict[str, Any], ...] = ()

    def arrays(self) -> dict[str, ArraySpec]:
        """Return every array of a split: the three columns by name, then the hooks by name."""
        specs = {name: ArraySpec(name, "int64", 0, "int64") for name in COLUMNS}
        for hook, width in self.hooks.items():
            specs[hook] = ArraySpec(f"acts/{hook_to_path(hook)}", STORED_DTYPE[self.dtype], width, self.dtype)
        return specs

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the root group, with their checksum."""
        body = {
            "format_version": FORMAT_VERSION,
            "hooks": self.hooks,
            "dtype": STORED_DTYPE[self.dtype],
            "logical_dtype": self.dtype,
            "chunk_rows": self.geometry.chunk_rows,
            "shard_rows": self.geometry.shard_rows,
            "block_rows": self.geometry.block_rows,
            "seed": self.seed,
            "run_length": self.run_length,
            "shuffle": self.shuffle,
            "covariance": self.covariance,
            "provenance": self.provenance,
            "retain_until": self.retain_until,
            "data_licence": self.data_licence,
            "sealed": self.sealed,
            "splits": self.splits,
            "erasures": list(self.erasures),
        }
        return {**body, "crc32c": record_crc(body)}

    def write(self, store: Place) -> None:
        """Replace the metadata of the root group, durably."""
        (store / "zarr.json").write(self._text())

    def create(self, store: Place) -> None:
        """Write the metadata of the root group of a new store, durably; TakenError if there is another."""
        (store / "zarr.json").create(self._text())

    @classmethod
    def read(cls, store: Place) -> Description:
        """Read the root group's attributes.

        Raises
        ------
        StoreError
            There is no store, its metadata is damaged, or its format is unknown.
        """
        path = store / "zarr.json"
        if path.size() is None:
            raise StoreError(f"{store} is not an activation store", got=f"no {path}")
        try:
            a = dict(json.loads(path.read())["attributes"])
            crc = a.pop("crc32c")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged: it is not the metadata of a store") from error
        if a.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{path}: unknown format", got=str(a.get("format_version")), expected=str(FORMAT_VERSION)
            )
        if record_crc(a) != crc:
            raise StoreError(f"{path} is damaged: its checksum does not match")
        rows = Geometry(a.pop("chunk_rows"), a.pop("shard_rows"), a.pop("block_rows"))
        dtype, erasures = a.pop("logical_dtype"), tuple(a.pop("erasures"))
        same = {name: value for name, value in a.items() if name not in ("format_version", "dtype")}
        return cls(dtype=dtype, geometry=rows, erasures=erasures, **same)

    def _text(self) -> bytes:
        return json.dumps(group_metadata(self.attributes()), indent=1).encode()


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the zarr v3 metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def hook_to_path(hook: str) -> str:
    """Return a hook's name as one path element; `path_to_hook` gives it back.

    Examples
    --------
    >>> hook_to_path("layers.2:in")
    'layers.2%3Ain'
    """
    name = quote(hook, safe="")
    return f"%{ord(name[0]):02X}{name[1:]}" if name[:1] in (".", "_") else name


def path_to_hook(name: str) -> str:
    """Return the hook that a path element stands for."""
    return unquote(name)


def check_split(name: str) -> str:
    """Return a split's name if it can be a folder.

    Raises
    ------
    StoreError
        It has other characters than letters, digits, `_` and `-`, or is the name of something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in ("commits", "blocks", "lock"):
        raise StoreError(f"{name!r} cannot name a split", expected="letters, digits, _ and -")
    return name


def _power_of_two(value: int) -> int:
    return 1 << max(value, 1).bit_length() - 1
