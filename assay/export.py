"""Handing a run's dictionary to others: the labelled bundle, or the weights alone in another library's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from label.bundle import dictionary_folder, write_bundle
from label.provenance import configuration
from sae.checkpoint import load_sae, read_header
from sae.exports import Origin, export

from .inspect import read_run


def export_run(folder: Path, format_: str, out: Path | None) -> str:
    """Write the dictionary of a run and say where it is.

    Parameters
    ----------
    folder
        The run.
    format_
        native is the bundle with labels and evidence; the others are weights alone.
    out
        The folder to write; None puts it into the run.

    Raises
    ------
    ConfigError, CheckpointError
        The run has no dictionary, the format cannot express it, or `out` holds something else.
    """
    run = read_run(folder)
    if format_ == "native":
        out = write_bundle(folder, out or folder / "dictionary")
        return f"dictionary in {out}; check it with `assay inspect {out} --verify`"
    weights, out = dictionary_folder(folder, run), out or folder / f"dictionary-{format_}"
    hook = read_header(weights)["extra"].get("hook") or ""
    origin = Origin(model=_model(run), hook=hook, context=_context(folder))
    export(load_sae(weights), out, format_, origin=origin)
    return f"dictionary in {out}, for {format_}: codes and rows are in raw activation units"


def _model(run: dict[str, Any]) -> str:
    model = configuration(run).get("model") or {}
    return str(model.get("path") or model.get("kind") or "")


def _context(folder: Path) -> int | None:
    """Return the length of the longest history of the panel, where there is one."""
    profile = folder / "panel" / "profile.json"
    if not profile.is_file():
        return None
    return int(json.loads(profile.read_text(encoding="utf-8"))["rows_per_entity"][-1])
