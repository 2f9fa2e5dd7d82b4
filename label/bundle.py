"""The dictionary as others get it: folded weights, features with evidence, concepts, a card, checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from activations_cache.models import weights_hash
from sae.checkpoint import CONFIG, WEIGHTS, read_header
from sae.errors import CheckpointError, ConfigError
from sae.strict_json import as_json

from .card import card
from .folders import check_place, replaced_folder
from .naming import column_name
from .provenance import configuration, dictionary_stage
from .tables import FORMAT_VERSION as TABLES_VERSION
from .tables import read_summary, read_table

FORMAT_VERSION = 1
KIND = "bundle"
CHECKSUMS = "checksums.json"
DICTIONARY = "dictionary.json"
EVIDENCE = ("associations", "groups")


def write_bundle(run_folder: Path, out: Path) -> Path:
    """Write the labelled dictionary of a run as a folder that stands for itself.

    It holds the folded weights (`sae.checkpoint.load_sae` reads the folder), dictionary.json (provenance,
    rule, counts), features.parquet and .jsonl with a stable column name per feature, concepts.parquet,
    concepts.json with the exact expressions where the run has them, the evidence tables, card.md and
    checksums.json.

    Parameters
    ----------
    run_folder
        What `assay run` wrote, labels included.
    out
        The bundle; an earlier bundle there is replaced once the new one is whole.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ConfigError
        The run has no labels or no dictionary, its labels are damaged or of an earlier one, or `out` holds something
        that is not a bundle.
    CheckpointError
        The dictionary is damaged or not folded.
    """
    check_place(out, CHECKSUMS, KIND)
    run = _read_json(run_folder / "run.json")
    labels = run_folder / "labels"
    if not (labels / "summary.json").is_file():
        raise ConfigError(
            f"{run_folder} has no labels",
            do="`assay run` with the sections concepts and label first, or --format saelens (or another) for weights alone",
        )
    sae = labelled_dictionary(run_folder, run)
    header = read_header(sae)
    if not header["folded"]:
        raise CheckpointError(
            f"{sae} reads scaled activations", do="export a folded dictionary, as training saves it"
        )
    summary = read_summary(labels)
    with replaced_folder(out, CHECKSUMS, KIND) as folder:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(sae / name, folder / name)
        features = _with_columns(read_table(labels, "features"), int(header["sae"]["d_sae"]))
        pq.write_table(features, folder / "features.parquet")
        _write_lines(folder / "features.jsonl", features.to_pylist())
        for name in ("concepts", *EVIDENCE):
            pq.write_table(read_table(labels, name), folder / f"{name}.parquet")
        expressions = _read_json(run_folder / "concepts" / "expressions.json")
        _write_json(folder / "concepts.json", _concepts(read_table(labels, "concepts"), expressions))
        dictionary = _describe(run_folder, run, sae, header, summary)
        _write_json(folder / DICTIONARY, dictionary)
        (folder / "card.md").write_text(card(dictionary, features.to_pylist()), encoding="utf-8")
        _write_json(folder / CHECKSUMS, _checksums(folder))
    return out


def verify_bundle(path: Path) -> dict[str, Any]:
    """Check every file of a bundle against its checksum.

    Returns
    -------
    dict
        dictionary.json.

    Raises
    ------
    CheckpointError
        The folder is no bundle, or files are missing or changed; all of them are named.
    """
    checksums = _read_json(path / CHECKSUMS)
    files = checksums.get("files")
    if checksums.get("kind") != KIND or not isinstance(files, dict):
        raise CheckpointError(f"{path} is no bundle, or its {CHECKSUMS} is damaged", do="export it again")
    if checksums.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of another format",
            got=str(checksums.get("format_version")),
            expected=str(FORMAT_VERSION),
        )
    missing = [name for name in files if not (path / name).is_file()]
    changed = [name for name in files if name not in missing and _sha256(path / name) != files[name]]
    if missing or changed:
        problems = [f"{name} is missing" for name in missing] + [f"{name} was changed" for name in changed]
        raise CheckpointError(
            f"the bundle {path} is damaged", got="; ".join(problems), do="copy or export it again"
        )
    return read_bundle(path)


def read_bundle(path: Path) -> dict[str, Any]:
    """Return dictionary.json of a bundle, without reading the checksums.

    Raises
    ------
    CheckpointError
        The folder is no bundle, or one of another format version.
    """
    dictionary = _read_json(path / DICTIONARY)
    if dictionary.get("kind") != KIND or dictionary.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"no readable bundle in {path}", expected=f"a {DICTIONARY} of format_version {FORMAT_VERSION}"
        )
    return dictionary


def labelled_dictionary(run_folder: Path, run: Mapping[str, Any]) -> Path:
    """Return the dictionary that the labels speak of.

    Raises
    ------
    ConfigError
        The run has another dictionary by now, or it cannot be told which one is the run's.
    """
    found, stages = dictionary_folder(run_folder, run), run.get("stages", {})
    made = dictionary_stage(run)
    spoken_of = stages.get("label", {}).get("inputs", {}).get(f"after {made}")
    if spoken_of is not None and spoken_of != stages.get(made, {}).get("fingerprint"):
        raise ConfigError(
            f"the labels of {run_folder} are not of its present dictionary, {found.name}, which is newer",
            do="`assay label` with the run's configuration first, or `assay export --format saelens` (or another) for "
            "weights alone",
        )
    return found


def dictionary_folder(run_folder: Path, run: Mapping[str, Any]) -> Path:
    """Return the dictionary that the run trained, or brought in, last.

    Raises
    ------
    ConfigError
        The run's record names none, and there is not exactly one.
    """
    recorded = run.get("stages", {}).get(dictionary_stage(run), {}).get("output")
    if recorded is not None:
        return run_folder / str(recorded)
    found = sorted(p.parent for p in run_folder.glob(f"sae/*/{CONFIG}"))
    if len(found) != 1:
        raise ConfigError(
            f"cannot tell which dictionary of {run_folder} to export",
            got=", ".join(p.name for p in found) or "none",
            expected="one folder in sae/, or a run.json that names it",
        )
    return found[0]


def _describe(
    run_folder: Path, run: Mapping[str, Any], sae: Path, header: Mapping[str, Any], summary: Mapping[str, Any]
) -> dict[str, Any]:
    config, extra = configuration(run), header["extra"]
    panel = run_folder / "panel"
    model = run_folder / "model"
    profile = _read_json(panel / "profile.json")
    counts = ("n_features", "n_labelled", "n_dead", "n_learned", "n_used", "n_learned_and_used", "reasons")
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "tables_format_version": TABLES_VERSION,
        "name": run.get("name") or sae.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "hook": extra.get("hook"),
        "d_in": header["d_in"],
        "sae": header["sae"],
        "weights": {"file": WEIGHTS, "sha256": _sha256(sae / WEIGHTS)},
        "provenance": {
            "dictionary": sae.name,
            "seed": extra.get("seed"),
            "training": extra,
            "model": {
                "kind": (config.get("model") or {}).get("kind"),
                "weights": weights_hash(model) if model.is_dir() else None,
            },
            "data": {
                "panel_sha256": _sha256(panel / "panel.parquet")
                if (panel / "panel.parquet").is_file()
                else None,
                "store": extra.get("store"),
                **{k: profile[k] for k in _PROFILE if k in profile},
            },
            "versions": run.get("versions", {}),
            "config": config,
        },
        "label_rule": config.get("label") or {},
        "counts": {name: summary.get(name) for name in counts},
        "fidelity": summary.get("fidelity", {}),
        "controls": summary.get("controls", {}),
        "removal": summary.get("removal"),
        "fdr_q": summary.get("fdr_q"),
    }


_PROFILE = (
    "product", "columns", "rows", "entities", "first_period", "last_period", "calendar", "splits", "outcome_rate",
)  # fmt: skip


def _with_columns(features: pa.Table, d_sae: int) -> pa.Table:
    """Add the stable column name of every feature; unlabelled ones are named by their number alone."""
    names = [
        column_name(
            f["feature"], d_sae, f["concept"] if f["status"] == "labelled" else None, f["low"], f["high"]
        )
        for f in features.select(["feature", "status", "concept", "low", "high"]).to_pylist()
    ]
    return features.append_column("column", pa.array(names, pa.string()))


def _concepts(concepts: pa.Table, expressions: Mapping[str, Any]) -> dict[str, Any]:
    keep = ("text", "category", "kind", "type", "risk", "applicable", "reason")
    return {
        "format_version": FORMAT_VERSION,
        "concepts": {
            c["concept"]: {k: c[k] for k in keep} | {"expr": expressions.get(c["concept"])}
            for c in concepts.to_pylist()
        },
    }


def _checksums(folder: Path) -> dict[str, Any]:
    files = {p.name: _sha256(p) for p in sorted(folder.iterdir())}
    return {"kind": KIND, "format_version": FORMAT_VERSION, "algorithm": "sha256", "files": files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged", got=str(error), expected="JSON") from error
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(as_json(value, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    lines = [as_json(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
