"""Where a store lies: a folder of a disk or a prefix of an object store, behind one interface.

`Place` says what a store needs of it. `LocalPlace` is a path; `ObjectPlace` is a key below a bucket, on anything
that obstore speaks to. Whoever opens a store takes a `Location` and asks `place_of` for the place.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from sae.errors import StoreError

from .base import Lock, LockedError, NewFile, Place, TakenError
from .local import LocalPlace

__all__ = [
    "LocalPlace",
    "Location",
    "Lock",
    "LockedError",
    "NewFile",
    "Place",
    "TakenError",
    "place_of",
    "point_to",
]

Location = str | os.PathLike[str] | Place
"""A path, a URL such as s3://bucket/prefix, or a place."""

_POINTER = "store"


def place_of(location: Location) -> Place:
    """Return the place that a path or URL names; a file that `point_to` wrote stands for where it points.

    Raises
    ------
    ConfigError
        It is a URL and obstore is not installed, or cannot be one of an object store.
    StoreError
        It is a file that names no place.
    """
    if isinstance(location, Place):
        return location
    text = os.fspath(location)
    if re.match(r"[a-z][a-z0-9+.-]+://", text):
        # an optional dependency
        from .objects import ObjectPlace

        return ObjectPlace.from_url(text)
    path = Path(text)
    return place_of(_target(path)) if path.is_file() else LocalPlace(path)


def point_to(path: Path, place: Place) -> None:
    """Write a small file, durably, that stands for a place elsewhere."""
    LocalPlace(path).write(json.dumps({_POINTER: place.address}).encode())


def _target(path: Path) -> str:
    try:
        target = json.loads(path.read_bytes())[_POINTER]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is not an activation store", got="a file", expected="a folder or a URL"
        ) from error
    return str(target)
