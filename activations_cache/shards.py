"""Shard files: a valid zarr v3 `sharding_indexed` encoder that streams, and reads straight into buffers.

A shard is its chunks one after the other, each followed by its CRC-32C, then the index (offset and length of
each chunk, 2**64 - 1 where there is none) with its own CRC-32C. All chunks are whole; the last one of a block
is padded with the fill value. Offsets are therefore known without reading the index.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import google_crc32c
import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from sae.errors import StoreError

from .copying import Copying
from .durable import crc32c
from .places import Place
from .places.pieces import Pieces, copy_pieces
from .schema import MISSING_CHUNK, ArraySpec, Geometry

_BYTES_AT_ONCE = 2 << 20
_own = threading.local()


def write_shard(
    path: Place,
    source: Shaped[np.ndarray, "rows ..."],
    order: Int64[np.ndarray, " n"],
    *,
    spec: ArraySpec,
    geometry: Geometry,
    copying: AbstractContextManager[Copying],
) -> int:
    """Write rows `source[order]` as one shard file and return the checksum of its chunks' checksums.

    Parameters
    ----------
    path
        Final name; it appears only when the file is whole and synced.
    source, order
        Rows to choose from and which ones, in storage order; at most `shard_rows`.
    spec, geometry
        The array that the shard belongs to.
    copying
        Entered while rows are copied; the sync to the disk is after it.

    Raises
    ------
    StoreError
        The disk is full.
    """
    rows, crcs = geometry.chunk_rows, b""
    chunk_bytes = rows * spec.row_bytes
    with path.new_file() as file, copying as (scratch, visit):
        # small chunks several at a time: every call may have to wait for another thread
        at_once = max(1, min(_BYTES_AT_ONCE // chunk_bytes, geometry.chunks_per_shard))
        chunks = scratch.array("chunks", (at_once, rows, *spec.row_shape), spec.dtype)
        held = chunks.reshape(at_once * rows, *spec.row_shape)
        for start in range(0, len(order), len(held)):
            part = order[start : start + len(held)]
            np.take(source, part, axis=0, out=held[: len(part)], mode="clip")
            whole = chunks[: geometry.chunks_of(len(part))]
            held[len(part) : len(whole) * rows] = spec.fill
            visit(held[: len(part)])
            found = [crc32c(chunk).to_bytes(4, "little") for chunk in whole]
            crcs += b"".join(found)
            file.write([piece for chunk in zip(whole, found, strict=True) for piece in chunk])
        index = _index(len(order), chunk_bytes, geometry).tobytes()
        file.write([index, crc32c(index).to_bytes(4, "little")])
    return crc32c(crcs)


class ArrayReader:
    """Reads one array of one writer and split: whole chunks, checked the first time each is read.

    Parameters
    ----------
    folder
        The array's folder.
    spec, geometry
        Its description.
    """

    def __init__(self, folder: Place, spec: ArraySpec, geometry: Geometry) -> None:
        self.folder, self.spec, self.geometry = folder, spec, geometry
        self._checked: set[int] = set()

    def locate(self, chunk: int) -> tuple[Place, int]:
        """Return the file of a chunk and the byte at which it starts."""
        shard, j = divmod(chunk, self.geometry.chunks_per_shard)
        return self.folder / self.spec.shard_name(shard), j * (
            self.geometry.chunk_rows * self.spec.row_bytes + 4
        )

    def read(self, chunk: int, start: int, out: Shaped[np.ndarray, "rows ..."]) -> None:
        """Read rows `start` .. `start + len(out)` of a chunk into a C-contiguous array of the stored format.

        Raises
        ------
        StoreError
            The file is missing, too short, or the chunk's checksum does not match.
        """
        path, offset = self.locate(chunk)
        width, rows = self.spec.row_bytes, self.geometry.chunk_rows
        if chunk in self._checked:
            path.read_into([out], offset + start * width)
            return
        before = np.empty(start * width, np.uint8)
        after = np.empty((rows - start - len(out)) * width, np.uint8)
        crc = np.empty(4, np.uint8)
        path.read_into([before, out, after, crc], offset)
        found = 0
        for part in (before, out, after):
            found = crc32c(part, found) if part.size else found
        self._compare(chunk, found, crc)

    def expect(self, chunk: int) -> None:
        """Let the disk fetch a chunk that will be read whole, as those are whose checksum was not compared yet."""
        if chunk not in self._checked:
            path, offset = self.locate(chunk)
            path.expect(offset, self.geometry.chunk_rows * self.spec.row_bytes + 4)

    def scatter(self, chunk: int, start: int, pieces: Pieces) -> None:
        """Read rows of a chunk from `start` on into pieces of memory, in the format on disk.

        Raises
        ------
        StoreError
            As for `read`.
        """
        path, offset = self.locate(chunk)
        width = self.spec.row_bytes
        if chunk in self._checked:
            path.scatter(pieces, offset + start * width)
            return
        data = _scratch(self.geometry.chunk_rows * width + 4)
        path.read_into([data], offset)
        self._compare(chunk, crc32c(data[:-4]), data[-4:])
        if path.remembers:
            # one system call; copying piece by piece would hold the interpreter's lock for as long
            path.scatter(pieces, offset + start * width)
        else:
            copy_pieces(data[start * width : start * width + int(pieces[:, 1].sum())], pieces)

    def read_rows(self, rows: Int64[np.ndarray, " n"], out: Shaped[np.ndarray, "n ..."]) -> None:
        """Read rows by their number in the array, ascending; each chunk they touch is checked once.

        Raises
        ------
        StoreError
            As for `read`.
        """
        chunks, starts = np.unique(rows // self.geometry.chunk_rows, return_index=True)
        ends = [*starts[1:].tolist(), len(rows)]
        for chunk, start, end in zip(chunks.tolist(), starts.tolist(), ends, strict=True):
            inside = rows[start:end] - chunk * self.geometry.chunk_rows
            first, last = int(inside[0]), int(inside[-1])
            window = np.empty((last - first + 1, *self.spec.row_shape), self.spec.dtype)
            self.read(chunk, first, window)
            np.take(window, inside - first, axis=0, out=out[start:end], mode="clip")

    def _compare(self, chunk: int, found: int, crc: UInt8[np.ndarray, "4"]) -> None:
        """Note that a chunk is whole; StoreError if its checksum is not the one that follows it."""
        if found != int.from_bytes(crc.tobytes(), "little"):
            raise StoreError(
                f"{self.locate(chunk)[0]} is damaged: the checksum of a chunk does not match",
                got=f"chunk {chunk % self.geometry.chunks_per_shard} of the file",
                do="restore the file from a copy, or harvest again",
            )
        self._checked.add(chunk)


def _scratch(size: int) -> UInt8[np.ndarray, " size"]:
    """Return memory of the calling thread, with any content: a new array for every chunk would be new pages each time."""
    if getattr(_own, "memory", None) is None or len(_own.memory) < size:
        _own.memory = np.empty(size, np.uint8)
    memory: np.ndarray = _own.memory[:size]
    return memory


def _index(rows: int, chunk_bytes: int, geometry: Geometry) -> np.ndarray:
    """Return offset and length of each chunk of a file, with its checksum."""
    index = np.full((geometry.chunks_per_shard, 2), MISSING_CHUNK, "<u8")
    there = np.arange(geometry.chunks_of(rows))
    index[: len(there), 0], index[: len(there), 1] = there * (chunk_bytes + 4), chunk_bytes + 4
    return index


def shard_problems(path: Place, rows: int, crc: int, *, spec: ArraySpec, geometry: Geometry) -> Iterator[str]:
    """Read a whole shard file and yield what is wrong with it.

    Parameters
    ----------
    path
        The file.
    rows, crc
        How many rows it holds and what `write_shard` returned, both from the commit record.
    spec, geometry
        The array it belongs to.
    """
    try:
        data = np.frombuffer(path.read(), np.uint8)
    except StoreError as error:
        yield str(error)
        return
    want = geometry.shard_bytes(rows, spec.row_bytes)
    if len(data) != want:
        yield f"{path} has the wrong size: {len(data)} bytes, expected {want}"
        return
    step = geometry.chunk_rows * spec.row_bytes + 4
    chunks, crcs = geometry.chunks_of(rows), b""
    for j in range(chunks):
        body, tail = data[j * step : (j + 1) * step - 4], data[(j + 1) * step - 4 : (j + 1) * step].tobytes()
        if crc32c(body) != int.from_bytes(tail, "little"):
            yield f"{path} is damaged: the checksum of chunk {j} does not match"
        crcs += tail
    index = _index(rows, step - 4, geometry)
    if data[chunks * step :].tobytes() != index.tobytes() + crc32c(index).to_bytes(4, "little"):
        yield f"{path} is damaged: its index does not match"
    if google_crc32c.value(crcs) != crc:
        yield f"{path} is not the file that was committed"
