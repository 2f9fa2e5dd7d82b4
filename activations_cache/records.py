"""Small JSON records that carry the checksum of what they say."""

from __future__ import annotations

import json
from typing import Any

from sae.errors import StoreError

from .durable import crc32c
from .places import Place


def record_crc(body: dict[str, Any]) -> int:
    """Return the checksum of a record's canonical text."""
    return crc32c(json.dumps(body, sort_keys=True).encode())


def write_record(place: Place, body: dict[str, Any]) -> None:
    """Replace a record, durably."""
    place.write(_text(body))


def create_record(place: Place, body: dict[str, Any]) -> None:
    """Write a record, durably, if there is none; TakenError if there is another."""
    place.create(_text(body))


def read_record(place: Place) -> dict[str, Any]:
    """Read a record.

    Raises
    ------
    StoreError
        The file is missing, is not a record, or its checksum does not match.
    """
    data = place.read()
    try:
        outer = json.loads(data)
        body, crc = outer["body"], outer["crc32c"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{place} is damaged: it is not a record", got=f"{len(data)} bytes") from error
    if not isinstance(body, dict) or record_crc(body) != crc:
        raise StoreError(f"{place} is damaged: its checksum does not match")
    return body


def file_crc(place: Place) -> tuple[int, int]:
    """Return size and checksum of a small file; StoreError if it is missing."""
    data = place.read()
    return len(data), crc32c(data)


def _text(body: dict[str, Any]) -> bytes:
    return json.dumps({"crc32c": record_crc(body), "body": body}, sort_keys=True).encode()
