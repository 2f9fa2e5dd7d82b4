"""Labelling a dictionary, from activations and concept values to tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import examples, records
from .config import LabelConfig
from .inputs import LabelInputs, Report, read_material
from .labelling import Labelling
from .tables import FORMAT_VERSION, write_table


def label_dictionary(
    inputs: LabelInputs, config: LabelConfig, out: Path, *, seed: int, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Label every feature of a dictionary and write the tables into `out`.

    Returns
    -------
    dict
        The summary, as written to summary.json.

    Raises
    ------
    StoreError, CheckpointError, ConceptError
        An input is missing, damaged, or belongs to something else.
    """
    work = Labelling(inputs, read_material(inputs, report=report), config, seed=seed, report=report)
    work.discover()
    work.confirm_pairs()
    work.compare()
    work.remove()
    work.group()
    out.mkdir(parents=True, exist_ok=True)
    return write_tables(work, out)


def write_tables(work: Labelling, out: Path) -> dict[str, Any]:
    """Write all tables and the summary."""
    features = [records.feature(work, j) for j in range(len(work.decisions))]
    write_table(out, "features", features)
    write_table(out, "associations", (records.association(work, i) for i in range(len(work.pairs))))
    write_table(out, "concepts", records.concepts(work))
    write_table(out, "groups", (records.group(work, g) for g in work.groups))
    _write_shown(work, out)
    summary = records.summary(work, features)
    summary["format_version"] = FORMAT_VERSION
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def _write_shown(work: Labelling, out: Path) -> None:
    evidence, raw = work.evidence["confirm"], work.raw("confirm")
    shown: list[dict[str, Any]] = []
    bins: list[dict[str, Any]] = []
    changes: list[dict[str, Any]] = []
    for feature in work.labelled():
        winner = work.decisions[feature].winner
        assert winner is not None
        holds, applies = work.by_id[winner.pair.target.concept].truth("confirm", winner.pair.target)
        bins += examples.histogram(evidence, feature, holds, applies)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([work.seed, 7, feature])))
        bands = examples.choose(
            evidence,
            feature,
            winner.pair.threshold,
            holds,
            applies,
            per_band=work.config.examples,
            rng=rng,
        )
        shown += examples.timelines(evidence, feature, bands, holds, applies, work.ids, raw)
        if work.ablation is not None and feature in work.ablation.removed:
            removed = work.ablation.removed[feature]
            changes += [
                {"feature": feature, "entity": work.ids[e], "change": float(c)}
                for e, c in zip(removed.entity, removed.change, strict=True)
            ]
    extra = [f"raw_{name}" for name in raw[0]] if raw is not None else []
    write_table(out, "examples", shown, extra=extra)
    write_table(out, "histograms", bins)
    write_table(out, "effects", changes)
