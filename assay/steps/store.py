"""Harvesting the activations of the model and of its twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from activations_cache.harvest import HarvestProgress, estimate, harvest, weights_hash
from activations_cache.panel import read_profile
from activations_cache.sources.base import ActivationSource, HarvestInputs
from activations_cache.splits import SplitConfig
from assay.stages import Context


def make_store(context: Context, out: Path) -> None:
    """Harvest the model's activations."""
    _harvest(context, out, context.folder / "model")


def make_twin_store(context: Context, out: Path) -> None:
    """Harvest the twin's activations."""
    _harvest(context, out, context.folder / "twin" / "model")


def _source(context: Context, model_folder: Path) -> ActivationSource:
    """Build the configured source; `model_folder` holds the fitted model or its twin, where there is one."""
    config = context.config
    assert config.harvest is not None
    provenance: dict[str, Any] = {}
    if config.fits_model:
        provenance |= {"model": "credit_transformer", "weights": weights_hash(model_folder)}
    if config.reads_panel:
        profile = read_profile(context.folder / "panel")
        run = json.loads((context.folder / "run.json").read_text())
        provenance["panel"] = {k: profile[k] for k in ("rows", "entities", "product", "columns")}
        provenance["panel_stage"] = run["stages"]["panel"]["fingerprint"]
    inputs = HarvestInputs(
        hooks=config.harvest.hooks,
        device=context.world.device,
        model=config.model,
        fitted=model_folder,
        panel=context.folder / "panel",
        split=SplitConfig() if config.panel is None else config.panel.split,
        provenance=provenance,
    )
    return config.source.build(inputs=inputs)


def _harvest(context: Context, out: Path, model_folder: Path) -> None:
    config = context.config
    assert config.harvest is not None
    source = _source(context, model_folder)
    cost = estimate(source, config.harvest.layout, out)
    widths = ", ".join(f"{h} ({d})" for h, d in source.hooks.items())
    context.console.note(
        f"{cost.rows:,} rows of {widths}: {cost.bytes / 1e6:,.0f} MB, {cost.free / 1e9:.0f} GB free"
    )
    with context.console.bar("rows") as bar:

        def report(p: HarvestProgress) -> None:
            bar(p.rows, p.total, p.text)

        harvest(source, out, config.harvest, seed=config.seed, world=context.world, report=report)
    source.write_truth(context.folder / "truth")
