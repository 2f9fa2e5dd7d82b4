"""The panel, the model that is fitted on it, and its untrained twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from activations_cache.panel import Panel
from activations_cache.prepare import prepare
from activations_cache.reference.generator import generate
from activations_cache.reference.predict import evaluate
from activations_cache.reference.shape import ModelShape, load_model, reinitialised
from activations_cache.tables import written_period
from assay.stages import Context

TWIN_SEED = 7919
"""Added to the run's seed for the twin's weights, so that they never repeat the model's initial ones."""


def make_reference(context: Context, out: Path) -> None:
    """Generate the panel with planted truth."""
    assert context.config.reference is not None
    generate(context.config.reference, out)


def make_panel(context: Context, out: Path) -> None:
    """Bring the user's table into canonical form and print its profile."""
    panel = context.config.panel
    assert panel is not None
    if panel.path is None:
        panel = panel.model_copy(update={"path": str(context.folder / "reference" / "panel.parquet")})
    out.mkdir()
    profile = prepare(panel, out, threads=torch.get_num_threads())
    for line in profile_lines(profile):
        context.console.note(line)


def make_model(context: Context, out: Path) -> None:
    """Fit the reference model and say how well it ranks entities it never saw."""
    from activations_cache.reference.fit import FitProgress, fit

    config = context.config
    assert isinstance(config.model, ModelShape) and config.fit is not None
    panel = Panel.open(context.folder / "panel")
    rows = int((panel.split == 0).sum())
    context.console.note(
        f"up to {config.fit.epochs} epochs over {rows:,} rows; stops after {config.fit.patience} without improvement"
    )
    with context.console.bar("batches") as bar:

        def report(p: FitProgress) -> None:
            bar(p.epoch * p.batches + p.batch, p.epochs * p.batches, f"epoch {p.epoch + 1}: {p.text}")

        model, history = fit(
            panel,
            config.model,
            config.fit,
            seed=config.seed,
            device=context.world.device,
            work=context.work("fit"),
            report=report,
        )
    model.save_pretrained(out)
    scores = {split: evaluate(model, panel, split) for split in ("discover", "confirm")}
    record = {"format_version": 1, "history": history}
    record |= {split: None if s is None else s.to_dict() for split, s in scores.items()}
    (out / "evaluation.json").write_text(json.dumps(record, indent=1))
    if scores["confirm"] is not None:
        s = scores["confirm"]
        context.console.note(
            f"{len(history)} epochs; on {s.n:,} unseen entities AUC {s.auc:.3f}, calibration error {s.calibration_error:.3f}"
        )


def make_twin_model(context: Context, out: Path) -> None:
    """Draw the model's weights anew."""
    model = load_model(context.folder / "model")
    reinitialised(model, context.config.seed + TWIN_SEED).save_pretrained(out)


def profile_lines(profile: dict[str, Any]) -> list[str]:
    """Return a panel's profile in a few lines."""
    length = profile["rows_per_entity"]
    first, last = (written_period(profile[f"{end}_period"], profile["calendar"]) for end in ("first", "last"))
    lines = [
        f"{profile['rows']:,} rows, {profile['entities']:,} entities, periods {first} to {last}, "
        f"{length[0]} to {length[4]} rows each (median {length[2]}), {profile['gaps']:,} gaps",
        ", ".join(f"{name} {s['entities']:,}" for name, s in profile["splits"].items() if s["entities"])
        + " entities",
    ]
    late = profile["splits"].get("out_of_time", {}).get("rows", 0)
    if late:
        lines[-1] += f"; {late:,} of the rows out of time"
    missing = {n: c["missing"] for n, c in profile["column_profile"].items() if c["missing"] > 0}
    if missing:
        lines.append("missing: " + ", ".join(f"{n} {m:.1%}" for n, m in missing.items()))
    if profile["outcome_rate"] is not None:
        lines.append(f"outcome 1 on {profile['outcome_rate']:.2%} of {profile['outcome_known']:,}")
    return lines
