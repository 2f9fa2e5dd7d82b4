"""How a store is begun or continued: its description, and the names that a dead writer left in use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sae.errors import ConfigError, StoreError

from .commits import Commit, end_rows
from .durable import PARTIAL
from .places import Lock, Place, TakenError
from .schema import Description, StoreLayout
from .verify import shard_files

_LATER = ("crc32c", "sealed", "splits", "erasures")


class CompleteError(StoreError):
    """The store is sealed."""


def describe(
    hooks: Mapping[str, int],
    layout: StoreLayout,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    run_length: int = 1,
) -> Description:
    """Return what the root of a store says that is begun with these settings; see `StoreWriter`.

    Raises
    ------
    ConfigError
        There is no hook, or a number is out of range.
    """
    if not hooks or run_length < 1 or seed < 0:
        got = f"hooks {list(hooks)}, run_length {run_length}, seed {seed}"
        raise ConfigError(
            "a store needs a hook, a run length of at least 1 and a seed of at least 0", got=got
        )
    return Description(
        hooks=dict(hooks),
        dtype=layout.dtype,
        geometry=layout.geometry(hooks),
        seed=seed,
        run_length=run_length,
        provenance=json.loads(json.dumps(dict(provenance))),
        shuffle=layout.shuffle,
        covariance=layout.covariance,
        retain_until=layout.retain_until.isoformat() if layout.retain_until else "",
        data_licence=layout.data_licence,
    )


def begin(store: Place, wanted: Description) -> Description:
    """Create the root group, or check that the one that is there was begun in the same way.

    Raises
    ------
    CompleteError
        The store is sealed.
    StoreError
        It was begun with other settings.
    """
    try:
        wanted.create(store)
    except TakenError:
        found = Description.read(store)
    else:
        return wanted
    if found.sealed:
        raise CompleteError(
            f"{store} is complete; nothing can be added to it", do="harvest into another place"
        )
    check_same(store, found, wanted)
    return found


def check_same(store: Place, found: Description, wanted: Description) -> None:
    """Check that a store was begun with the settings wanted; the versions it notes may be others.

    Raises
    ------
    StoreError
        It was not; the message says which differ.
    """
    a, b = _settings(found), _settings(wanted)
    differ = [key for key in b if a[key] != b[key]]
    if differ:
        raise StoreError(
            f"{store} was begun with other settings",
            got="; ".join(f"{key} {b[key]}" for key in differ),
            expected="; ".join(f"{key} {a[key]}" for key in differ),
            do="harvest with the settings it was begun with, or into another place",
        )


def _settings(description: Description) -> dict[str, Any]:
    """Return what must not change while a store is written."""
    settings = {key: value for key, value in description.attributes().items() if key not in _LATER}
    provenance = {key: value for key, value in description.provenance.items() if key != "versions"}
    return {**settings, "provenance": provenance}


class Unused(NamedTuple):
    """Which names a writer may use.

    Attributes
    ----------
    rows
        Rows of each split's arrays up to which shards are in use.
    revisions
        First revision that is not in use, of the blocks that have any.
    """

    rows: dict[str, int]
    revisions: dict[int, int]


def unused_names(folder: Place, commits: Sequence[Commit], description: Description, lock: Lock) -> Unused:
    """Return which names a writer that continues may use; what a dead one left is removed if that is safe.

    Where it is not, for a writer that only slept may still be about to put an object, or to remove one, names
    that were ever in use are not used again, and `seal` sweeps.
    """
    if lock.final:
        sweep(folder, commits, description)
    rows = end_rows(commits, description.geometry)
    revisions: dict[int, int] = {}
    for name in folder.sizes():
        shard = re.fullmatch(r"([^/]+)/.*c\.(\d+)(\.0)?", name)
        if shard:
            end = (int(shard[2]) + 1) * description.geometry.shard_rows
            rows[shard[1]] = max(rows.get(shard[1], 0), end)
        extra = re.fullmatch(r"blocks/(\d{8})\.(\d+)\.safetensors", name)
        if extra:
            block = int(extra[1])
            revisions[block] = max(revisions.get(block, 0), int(extra[2]) + 1)
    return Unused(rows, revisions)


def sweep(folder: Place, commits: Sequence[Commit], description: Description) -> None:
    """Remove what a killed writer left behind: half-written files, and files that no commit names."""
    keep = {f"blocks/{commit.extra_name}" for commit in commits}
    keep |= {name for name, *_ in shard_files(description, commits)}
    litter = [
        name
        for name in folder.sizes()
        if name.endswith(PARTIAL) or (name not in keep and re.fullmatch(r"blocks/.*|.*/c\.\d+(\.0)?", name))
    ]
    folder.map(lambda name: (folder / name).remove(), litter)
