"""Who harvests what: a source is divided into a fixed number of parts, and processes take parts.

The number of parts is fixed when a store is begun; part p is written by writer p, which has its own cursor. A
process takes a part by the lock of its writer, which ends with the process, however that ends; so a part is
written by one process at a time, a dead process's part is taken up by another, and a store may be continued by
more or fewer processes than began it. A record marks a part that its source has no more rows of.
"""

from __future__ import annotations

from contextlib import suppress

from sae.errors import StoreError
from sae.world import World

from .commits import writer_path
from .places import Place, TakenError
from .records import create_record, read_record


def fix_parts(store: Place, *, wanted: int, processes: int) -> int:
    """Return the number of parts of a store, and fix it if this is the first call.

    Parameters
    ----------
    store
        The store; it comes into being if need be.
    wanted
        What the user asks for; 0 = as many as there are processes.
    processes
        How many work on it now.

    Raises
    ------
    StoreError
        The store was begun with another number, or the record is damaged.
    """
    record = store / "parts.json"
    # of several that begin a store with other numbers of processes, the first fixes it
    with suppress(TakenError):
        create_record(record, {"format_version": 1, "parts": wanted or processes})
    parts = int(read_record(record)["parts"])
    if wanted not in (0, parts):
        raise StoreError(
            f"{store} was begun with another number of parts",
            got=str(wanted),
            expected=str(parts),
            do="leave harvest.parts at 0 to continue, or harvest into another place",
        )
    return parts


def open_parts(store: Place, parts: int, world: World) -> list[int]:
    """Return the parts that have not ended, those first that no other rank begins with."""
    ends = store.map(lambda part: (writer_path(store, part) / "end.json").size(), range(parts))
    left = [part for part, end in enumerate(ends) if end is None]
    return sorted(left, key=lambda part: (part - world.rank) % world.size)


def end_part(store: Place, part: int) -> None:
    """Note that a part's source has ended and all its rows are committed."""
    create_record(writer_path(store, part) / "end.json", {"format_version": 1, "part": part})


def world_of(part: int, parts: int, world: World) -> World:
    """Return the world in which a source yields one part, whoever reads it."""
    return World(rank=part, size=parts, device=world.device, axes={"data": parts, "feature": 1})
