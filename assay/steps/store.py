"""Harvesting the activations of the model and of its twin."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from activations_cache.harvest import Estimate, HarvestProgress, estimate, harvest, probe
from activations_cache.models import weights_hash
from activations_cache.panel import read_profile
from activations_cache.places import Place, place_of, point_to
from activations_cache.schema import Description
from activations_cache.sources.base import ActivationSource, HarvestInputs
from activations_cache.splits import SplitConfig
from activations_cache.store import ActivationStore
from assay.stages import Context
from sae.errors import StoreError
from sae.world import World
from train.run import choose_hook


def make_store(context: Context, out: Path) -> None:
    """Harvest the model's activations."""
    _harvest(context, out, context.folder / "model", stage="harvest")


def prove_source(context: Context) -> None:
    """Raise what is wrong with the model, the hooks or what it reads, before a store of other settings is removed."""
    source = _source(context, context.folder / "model", {})
    _keep_away_who_was_erased(source, context.folder / "activations.zarr")


def prove_twin_source(context: Context) -> None:
    """Raise what is wrong with what the twin reads, before its store of other settings is removed."""
    source = _source(context, context.folder / "twin" / "model", {})
    _keep_away_who_was_erased(source, context.folder / "twin" / "activations.zarr")


def make_twin_store(context: Context, out: Path) -> None:
    """Harvest the twin's activations."""
    _harvest(context, out, context.folder / "twin" / "model", stage="harvest twin")


def _source(context: Context, model_folder: Path, origin: dict[str, Any]) -> ActivationSource:
    """Build the configured source; `model_folder` holds the fitted model or its twin, where there is one.

    Raises
    ------
    UserError
        It cannot be read, or the dictionary is to read a hook that is not harvested.
    """
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
    source = config.source.build(inputs=inputs)
    source.provenance = {**source.provenance, **origin}
    section = config.dictionary or config.train
    if section is not None and section.hook is not None:
        choose_hook(section, source.hooks)
    return source


def erasures(store: Path) -> list[dict[str, Any]]:
    """Return what was erased from a store since it was harvested."""
    if not store.is_dir():  # from an object store nobody is erased
        return []
    try:
        return list(Description.read(place_of(store)).erasures)
    except StoreError:  # hardly begun, or damaged: whoever reads it says so
        return []


def _keep_away_who_was_erased(source: ActivationSource, store: Path) -> None:
    """Refuse to harvest anew where people were erased, unless the source knows only whom the store still holds.

    Raises
    ------
    StoreError
        Somebody who was erased may come back.
    """
    erased = sum(entry["entities"] for entry in erasures(store))
    if not erased:
        return
    held = ActivationStore.open(store).entity_ids()
    known = set() if held is None else set(held["id"].to_pylist())
    others = len(set(source.entities["id"].to_pylist()) - known)
    if others:
        raise StoreError(
            f"{store} would be harvested anew, and who was erased from it might come back",
            got=f"{erased:,} erased entities; {others:,} of the source that the store does not hold",
            do="take who was erased out of the source first; if the others are new, remove the run's stores by hand then",
        )


def _origin(context: Context, stage: str) -> dict[str, Any]:
    """Return what a store says of how it came about: versions, configuration, hashes of data and stages before."""
    inputs = json.loads((context.folder / "run.json").read_text())["stages"][stage]["begun_inputs"]
    sections = ("source", "model", "seed")
    return {
        "versions": {package: version(package) for package in ("assay", "torch", "transformers")},
        "config": {name: inputs[name] for name in sections if name in inputs},
        "data": {name: mark for name, mark in inputs.items() if name.startswith(("file ", "after "))},
    }


def _harvest(context: Context, out: Path, model_folder: Path, *, stage: str) -> None:
    config, world = context.config, context.world
    assert config.harvest is not None
    source = _source(context, model_folder, _origin(context, stage))
    if config.harvest.store:
        _point(out, place_of(config.harvest.store) / out.relative_to(context.folder).as_posix())
    cost = estimate(source, config.harvest.layout, out)
    if world.is_main:
        widths = ", ".join(f"{h} ({d})" for h, d in source.hooks.items())
        context.console.note(f"{cost.rows:,} rows of {widths}: {_outlook(cost, source, world)}")
    with context.console.bar("rows") as bar:

        def report(p: HarvestProgress) -> None:
            bar(p.rows, p.total, p.text)

        harvest(source, out, config.harvest, seed=config.seed, world=world, report=report)
    if world.is_main:
        source.write_truth(context.folder / "truth")


def _outlook(cost: Estimate, source: ActivationSource, world: World) -> str:
    """Return what is still to be written, and how long that will take."""
    if not cost.left:
        return "all are written"
    part = cost.left / cost.rows
    text = "" if cost.left == cost.rows else f"{cost.left:,} of them to come, "
    text += f"{cost.bytes * part / 1e6:,.0f} MB, about "
    text += f"{timedelta(seconds=math.ceil(probe(source, world) * part))} by its first batches"
    return text if cost.free is None else f"{text}, {cost.free / 1e9:.0f} GB free"


def _point(out: Path, place: Place) -> None:
    """Let a file in the run folder stand for the store, which lies elsewhere."""
    # in this order: another process points first and begins the store then
    begun = (place / "zarr.json").size() is not None
    if out.exists():
        return
    if begun:
        raise StoreError(
            f"{place} holds a store already, of other inputs or another run",
            do="remove it (`aws s3 rm --recursive` for s3://), or give harvest.store another place",
        )
    point_to(out, place)
