"""A prefix of an object store: an object is whole or absent, and one that is not to change is put once.

Whatever obstore speaks to: s3://, gs://, az://. Credentials, endpoint and the rest come from its environment
variables, for S3 the usual AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL and, for an
endpoint without TLS, AWS_ALLOW_HTTP=true.

References
----------
Conditional writes: If-None-Match: * makes a put fail if there is an object, If-Match: ETAG if it has changed; AWS
and its like compare and write in one step and list what was put at once (docs.aws.amazon.com, Amazon S3 User
Guide, "Conditional requests" and "What is Amazon S3").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np

from sae.errors import ConfigError, StoreError

from .base import NewFile, Place, TakenError, too_short
from .lease import Lease
from .pieces import Pieces, copy_pieces

try:
    import obstore
    from obstore import exceptions
    from obstore.store import from_url
except ImportError as missing:
    raise ConfigError(
        "a store at a URL needs obstore, which is not installed", do="pip install 'assay[s3]'"
    ) from missing

A = TypeVar("A")
B = TypeVar("B")


class Version(NamedTuple):
    """The content of an object, and what tells it from every other that it had or will have."""

    data: bytes
    token: Any


@dataclass(frozen=True)
class ObjectPlace(Place):
    """An object, or all objects below a prefix.

    Attributes
    ----------
    root
        The bucket's URL.
    key
        Name in the bucket; its parts are joined by slashes.
    """

    root: str
    key: str
    _store: Any = field(repr=False, compare=False)

    threads: ClassVar[int] = 16
    poll_seconds: ClassVar[float] = 2.0
    remembers: ClassVar[bool] = False

    @classmethod
    def from_url(cls, url: str) -> ObjectPlace:
        """Return the place of a URL, such as s3://bucket/prefix.

        Raises
        ------
        ConfigError
            It has no bucket, or a scheme that obstore does not know.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        parts = [part for part in key.split("/") if part]
        if not bucket or {".", ".."} & set(parts):
            raise ConfigError("this is not the URL of a prefix", got=url, expected="s3://bucket/prefix")
        return cls(f"{scheme}://{bucket}", "/".join(parts), _bucket(f"{scheme}://{bucket}"))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.key.rpartition("/")[2]

    @property
    def address(self) -> str:
        """The URL."""
        return str(self)

    @property
    def parent(self) -> ObjectPlace:
        """The prefix that it is in."""
        return ObjectPlace(self.root, self.key.rpartition("/")[0], self._store)

    def __truediv__(self, name: str) -> ObjectPlace:
        return ObjectPlace(self.root, f"{self.key}/{name}".strip("/"), self._store)

    def read(self) -> bytes:
        """Return the whole content; StoreError if there is none."""
        found = self.read_version()
        if found is None:
            raise StoreError(f"{self} is missing")
        return found.data

    def read_version(self) -> Version | None:
        """Return the content and its version; None if there is none."""
        with self._errors():
            try:
                got = obstore.get(self._store, self.key)
                return Version(bytes(got.bytes()), _token(got.meta))
            except FileNotFoundError:
                return None

    def scatter(self, pieces: Pieces, offset: int) -> None:
        """Fill pieces of memory from `offset` on, with one request."""
        want = int(pieces[:, 1].sum())
        if not want:
            return
        with self._errors():
            try:
                got = memoryview(obstore.get_range(self._store, self.key, start=offset, length=want))
            except FileNotFoundError as error:
                raise StoreError(f"{self} is missing") from error
            except exceptions.GenericError as error:
                # a range that begins beyond the end is an error of no class of its own
                if (self.size() or 0) > offset:
                    raise
                raise too_short(self, want, offset) from error
        if len(got) < want:
            raise too_short(self, want - len(got), offset + len(got))
        copy_pieces(np.frombuffer(got, np.uint8), pieces)

    def expect(self, offset: int, size: int) -> None:
        """Do nothing: an object has no place to be fetched to, and many are read at once."""

    def write(self, data: bytes) -> None:
        """Replace the whole content."""
        with self._errors():
            obstore.put(self._store, self.key, data, use_multipart=False)

    def create(self, data: bytes | bytearray) -> None:
        """Write the content if there is none."""
        if self.exchange(data, None) is None and self.read() != data:
            # the same content may be ours, of a request whose answer was lost
            raise TakenError(f"{self} is there already, with other content")

    def exchange(self, data: bytes | bytearray, version: Any) -> Any:
        """Write the content if the object still has a version (None: if there is none), and return its new one.

        None comes back if the object has another version.
        """
        with self._errors():
            try:
                return _token(obstore.put(self._store, self.key, data, mode=version or "create"))
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return None
            except FileNotFoundError:
                if version is None:
                    raise
                return None

    @contextmanager
    def new_file(self) -> Iterator[NewFile]:
        """Gather pieces in memory and put them as one object."""
        content = _Gathered()
        yield content
        self.create(content.data)

    def make(self) -> set[Self]:
        """Return nothing: there are no folders."""
        return set()

    def sync(self) -> None:
        """Do nothing: what was put is durable."""

    def remove(self) -> None:
        """Remove one object, if it is there."""
        with self._errors():
            obstore.delete(self._store, self.key)

    def size(self) -> int | None:
        """Return the bytes of an object; None if there is none."""
        with self._errors():
            try:
                return int(obstore.head(self._store, self.key)["size"])
            except FileNotFoundError:
                return None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object below this prefix."""
        start = len(self.key) + 1 if self.key else 0
        with self._errors():
            pages = obstore.list(self._store, self.key or None)
            return {o["path"][start:]: int(o["size"]) for page in pages for o in page}

    def folders(self) -> list[str]:
        """Return the names of the prefixes directly in this one, sorted."""
        with self._errors():
            found = obstore.list_with_delimiter(self._store, self.key or None)["common_prefixes"]
            return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found)

    def free(self) -> None:
        """Return None: there is no bound."""

    def lock(self, *, wait: bool = False) -> Lease:
        """Lock the name of an object."""
        return Lease(self, wait=wait)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Return the function of every item, many at once."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="assay-objects") as pool:
            return list(pool.map(function, items))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the object store refuses into an error with an advice."""
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"there is no bucket {self.root}", do="make it first") from error
        except (exceptions.BaseError, PermissionError) as error:
            raise StoreError(
                f"{self}: the object store refused",
                got=str(error).splitlines()[0],
                do="check that the bucket exists, and the AWS_* environment variables "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP)",
            ) from error


@dataclass
class _Gathered:
    """The pieces of a new object."""

    data: bytearray = field(default_factory=bytearray)

    def write(self, buffers: Sequence[bytes | np.ndarray]) -> None:
        for buffer in buffers:
            self.data += buffer if isinstance(buffer, bytes) else buffer.data.cast("B")


def _token(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


@lru_cache(maxsize=16)
def _bucket(url: str) -> Any:
    """Return the connection to a bucket; all places in it share one."""
    try:
        return from_url(url)
    except (exceptions.BaseError, ValueError) as error:
        raise ConfigError("this is not the URL of an object store", got=str(error).splitlines()[0]) from error
