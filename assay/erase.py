"""Erasing people from a store, and from that of the twin beside it, which holds the same people."""

from __future__ import annotations

from pathlib import Path

from activations_cache.erase import erase, read_ids
from sae.errors import StoreError

HOLDERS = {
    "panel": "until the source is without them",
    "concepts": "as long as the panel",
    "labels": "ids and values of examples, until `assay run` has labelled anew",
    "report": "as long as the labels",
    "dictionary": "a copy of the labels: remove it, or export again",
}
"""What else of a run may be about a person, and until when; exports to other places cannot be known."""


def erase_people(store: str, file: Path, *, column: str | None = None) -> str:
    """Erase the entities that a file lists from a store and, where it is a run's own, from the twin's.

    Returns
    -------
    str
        What was erased, and what of the run still holds them.

    Raises
    ------
    StoreError
        Nobody who is listed was there; or what `erase` and `read_ids` raise.
    """
    ids = read_ids(file, column=column)
    path = Path(store).expanduser().absolute()
    run = path.parent if path.name == "activations.zarr" and (path.parent / "run.json").is_file() else None
    twin = None if run is None else run / "twin" / "activations.zarr"
    # the twin first: where it cannot be done, nothing is
    stores = [str(twin), store] if twin is not None and twin.is_dir() else [store]
    reports = {name: erase(name, ids) for name in stores}
    if not any(r.entities or r.completed for r in reports.values()):
        raise StoreError(
            f"nobody was erased: {' and '.join(stores)} hold none of the {len(set(ids)):,} ids in {file}",
            do="compare them with the panel's, which are text: spaces and leading zeros count",
        )
    lines = [f"{n}: {r.text}; check it with `assay inspect {n} --verify`" for n, r in reports.items()]
    held = [] if run is None else [f"  {n}: {t}" for n, t in HOLDERS.items() if (run / n).exists()]
    return "\n".join([*lines, *([f"Still about them in {run}:", *held] if held else [])])
