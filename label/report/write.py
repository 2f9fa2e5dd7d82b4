"""Writing a report: a folder of pages that load nothing and work from a file system."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from label.folders import replaced_folder

from .data import Labels
from .feature import feature_page
from .index import index_page

MARKER = "report.json"
KIND = "report"
FORMAT_VERSION = 1


def write_report(
    labels: Path,
    out: Path,
    *,
    run: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    hash_ids: bool = False,
) -> Path:
    """Write the pages of a finished labelling.

    Parameters
    ----------
    labels
        Folder of its tables.
    out
        Folder of the report; an earlier report there is replaced once the new one is whole.
    run, evaluation
        What run.json and the dictionary's evaluation.json hold; None leaves that part out.
    hash_ids
        Show entities as short hashes under a key that is thrown away. Their values are still shown: a history
        may give away who it is.

    Returns
    -------
    Path
        `out`; its first page is index.html.

    Raises
    ------
    ConfigError
        A table is missing, damaged, or of another format version; or `out` holds something that is not a report.
    """
    found = Labels.read(labels, run, evaluation, hash_ids=hash_ids)
    with replaced_folder(out, MARKER, KIND) as folder:
        (folder / "features").mkdir()
        (folder / "index.html").write_text(index_page(found), encoding="utf-8")
        for record in found.labelled:
            target = folder / found.pages[record["feature"]]
            target.write_text(feature_page(found, record), encoding="utf-8")
        marker = {"format_version": FORMAT_VERSION, "kind": KIND, "label_inputs": _label_inputs(run)}
        (folder / MARKER).write_text(json.dumps(marker) + "\n")
    return out


def shows_present_labels(report: Path, run: Mapping[str, Any]) -> bool:
    """Return whether pages are of the labels that a run has; those of an earlier version do not say of which they are."""
    try:
        marker = json.loads((report / MARKER).read_text(encoding="utf-8"))
        return bool(marker["label_inputs"] == _label_inputs(run))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _label_inputs(run: Mapping[str, Any] | None) -> Any:
    """Return what the labels were made of, which stays on record until others take their place."""
    return (run or {}).get("stages", {}).get("label", {}).get("inputs")
