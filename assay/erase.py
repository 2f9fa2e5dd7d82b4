"""Erasing people from a store, and from that of the twin beside it, which holds the same people."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

from activations_cache.erase import ErasureReport, erase, read_ids
from activations_cache.store import ActivationStore
from sae.errors import StoreError

from .freshness import run_lock

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
    UserError
        Nobody who is listed was there, another process works in the run, or what `erase` and `read_ids` raise.
    """
    ids = read_ids(file, column=column)
    path = Path(store).expanduser().absolute()
    run = path.parent if path.name == "activations.zarr" and (path.parent / "run.json").is_file() else None
    with nullcontext() if run is None else run_lock(run):
        report = erase(store, ids)
        lines = [_said(store, report)]
        gone = report.entities > 0 or report.completed
        twin = None if run is None else run / "twin" / "activations.zarr"
        if twin is not None and twin.is_dir():
            try:
                said = _erase_from_twin(twin, ids)
            except StoreError as error:
                raise StoreError(f"{lines[0]}\nbut not from the twin beside it: {error}") from error
            lines, gone = [*lines, said or f"{twin}: none of them"], gone or said is not None
    if not gone:
        stores = store if twin is None or not twin.is_dir() else f"{store} and {twin}"
        raise StoreError(
            f"nobody was erased: {stores} hold none of the {len(set(ids)):,} ids in {file}",
            do="compare them with the panel's, which are text: spaces and leading zeros count",
        )
    held = [] if run is None else [f"  {n}: {t}" for n, t in HOLDERS.items() if (run / n).exists()]
    return "\n".join([*lines, *([f"Still about them in {run}:", *held] if held else [])])


def _erase_from_twin(twin: Path, ids: list[str]) -> str | None:
    """Return what was done, None where nobody was there."""
    if not ActivationStore.open(twin, allow_incomplete=True).complete:
        # a harvest that goes on would read them again
        shutil.rmtree(twin)
        return f"{twin}: removed, since its harvest had not ended"
    report = erase(twin, ids)
    return _said(str(twin), report) if report.entities or report.completed else None


def _said(store: str, report: ErasureReport) -> str:
    return f"{store}: {report.text}; check it with `assay inspect {store} --verify`"
