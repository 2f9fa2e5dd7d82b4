"""Close a finished store: check its files, write its moments, index and entities, mark it complete last."""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from sae.errors import StoreError

from .begin import sweep
from .commits import Commit, Group, end_commits, read_groups, split_rows, write_metadata, writer_paths
from .durable import PARTIAL
from .index import Directory, read_block
from .moments import Moments
from .places import Location, Place, place_of
from .records import file_crc, write_record
from .schema import Description
from .verify import raise_problems, size_problems

FILES = ("index.safetensors", "moments.safetensors", "entities.parquet")


def seal(path: Location, *, entities: pa.Table | None = None) -> None:
    """Mark a store as complete, after all its writers have closed; on a complete store it does nothing.

    Of several processes that call it at once, one seals and the others wait for it.

    Parameters
    ----------
    path
        The store.
    entities
        Columns `entity` (int64, the code) and `id` (the user's own); without it codes stand for themselves.

    Raises
    ------
    StoreError
        A writer is still at work, a file is missing or has the wrong size, the store holds no rows, or the
        table lacks an entity of the store or has one twice.
    """
    store = place_of(path)
    with ExitStack() as locks:
        Description.read(store)
        lock = locks.enter_context((store / "lock").lock(wait=True))
        description = Description.read(store)
        if description.sealed:
            return
        held = [locks.enter_context((folder / "lock").lock()) for _, folder in writer_paths(store)]
        groups = read_groups(store)
        if not any(group.commits for group in groups):
            raise StoreError(f"{store} holds no rows", do="harvest before closing the store")
        for group, writing in zip(groups, held, strict=True):
            end_commits(group.folder, group.commits, writing)
            sweep(group.folder, group.commits, description)
            write_metadata(group.folder, description, group.commits)
        if lock.final:
            # records of the whole store that a killed process was about to put
            for name in store.sizes():
                if "/" not in name and name.endswith(PARTIAL):
                    (store / name).remove()
        raise_problems(store, [p for g in groups for p in size_problems(g.folder, description, g.commits)])
        finish(store, description, groups, entities)


def finish(path: Place, description: Description, groups: list[Group], entities: pa.Table | None) -> None:
    """Write what describes the whole store, its manifest, and then the mark that it is complete."""
    splits = split_rows(groups)
    directory, moments = merge_blocks(description, groups)
    if entities is not None:
        (path / "entities.parquet").write(_entities_file(entities, directory))
    (path / "index.safetensors").write(directory.to_bytes())
    (path / "moments.safetensors").write(bytes(save(moments)))
    files = {name: list(file_crc(path / name)) for name in FILES if (path / name).size() is not None}
    writers = {
        group.folder.name: {"blocks": len(group.commits), "crc32c": group.digest()} for group in groups
    }
    write_record(path / "manifest.json", {"splits": splits, "writers": writers, "files": files})
    replace(description, sealed=True, splits=splits).write(path)


def merge_blocks(description: Description, groups: list[Group]) -> tuple[Directory, dict[str, np.ndarray]]:
    """Return the index and the moments of all blocks together."""
    names = tuple(split_rows(groups))
    totals = {
        (split, hook): Moments.empty(width) for split in names for hook, width in description.hooks.items()
    }
    lines: list[tuple[int, Commit, dict[str, Any]]] = []
    for group in groups:
        for commit in group.commits:
            tensors = read_block(group.folder, commit)
            for split in commit.splits:
                for hook in description.hooks:
                    part = Moments.from_tensors(tensors, f"{split}/moments/{hook}")
                    totals[split, hook] = totals[split, hook].merge(part)
            index = {key: value for key, value in tensors.items() if key.endswith(("/entity", "/offsets"))}
            lines.append((group.number, commit, index))
    moments: dict[str, np.ndarray] = {}
    for (split, hook), total in totals.items():
        moments |= total.tensors(f"{split}/{hook}")
    return Directory.build(names, iter(lines)), moments


def _entities_file(entities: pa.Table, directory: Directory) -> bytes:
    if not {"entity", "id"} <= set(entities.column_names):
        raise StoreError(
            "the table of entities lacks a column", got=str(entities.column_names), expected="entity, id"
        )
    codes = entities.column("entity").to_numpy()
    if len(np.unique(codes)) != len(codes):
        raise StoreError("the table of entities has one code twice", expected="one row per entity")
    absent = np.setdiff1d(directory.entity, codes)
    if len(absent):
        shown = ", ".join(map(str, absent[:5].tolist()))
        raise StoreError(
            f"the table of entities lacks {len(absent)} entities of the store", got=f"no {shown}"
        )
    sink = io.BytesIO()
    pq.write_table(entities, sink)
    return sink.getvalue()
