"""Labelling the features and writing the pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from assay.stages import Context
from label.concepts.library import ConceptInfo, NotApplicable
from label.inputs import LabelInputs
from label.run import label_dictionary


def make_labels(context: Context, out: Path) -> None:
    """Label every feature."""
    config, folder = context.config, context.folder
    assert config.label is not None
    record = json.loads((folder / "concepts" / "concepts.json").read_text(encoding="utf-8"))
    twin = folder / "twin"
    has_twin = config.twin and config.fits_model and config.train is not None
    inputs = LabelInputs(
        store=folder / "activations.zarr",
        sae=folder / "sae" / context.dictionary,
        hook=context.hook,
        tables=[
            (folder / "concepts" / t["file"], [ConceptInfo.model_validate(c) for c in t["concepts"]])
            for t in record["tables"]
        ],
        not_applicable=[NotApplicable(*item) for item in record["not_applicable"]],
        panel=folder / "panel" if config.reads_panel else None,
        model=folder / "model" if config.fits_model else None,
        twin_store=twin / "activations.zarr" if has_twin else None,
        twin_sae=twin / "sae" / context.dictionary if has_twin else None,
        fidelity=_fidelity(context),
        split_seed=config.split_seed,
    )
    with context.console.bar("") as bar:
        label_dictionary(
            inputs,
            config.label,
            out,
            seed=config.seed,
            report=lambda phase, done, total: bar(done, total, phase),
        )


def make_report(context: Context, out: Path) -> None:
    """Write the static pages."""
    from label.report.write import write_report

    write_report(
        context.folder / "labels",
        out,
        run=json.loads((context.folder / "run.json").read_text(encoding="utf-8")),
        evaluation=_evaluation(context),
    )


def _evaluation(context: Context) -> dict[str, Any] | None:
    path = context.folder / "sae" / context.dictionary / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _fidelity(context: Context) -> dict[str, Any]:
    """Return the figures of the evaluation that the summary repeats; null where they were not measured."""
    evaluation = _evaluation(context) or {}
    rows, model = evaluation.get("confirm", {}), evaluation.get("fidelity", {})
    return {
        "fvu": rows.get("fvu"),
        "l0": rows.get("l0"),
        "dead": rows.get("dead"),
        "auc_model": model.get("model", {}).get("auc"),
        "auc_reference": model.get("reference_auc"),
        "auc_spliced": model.get("spliced", {}).get("auc"),
        "mean_abs_dpd": model.get("mean_abs_dpd"),
    }
