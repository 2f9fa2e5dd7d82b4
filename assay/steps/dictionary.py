"""Training dictionaries and measuring them on held-out entities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from activations_cache.models import PretrainedConfig
from activations_cache.reference.shape import load_model
from activations_cache.sources.base import HarvestInputs
from activations_cache.sources.reading import ModelSource
from activations_cache.sources.text import TextSourceConfig
from activations_cache.store import ActivationStore
from assay.config import RunConfig
from assay.stages import Context
from sae.base import SAE
from sae.checkpoint import load_sae
from sae.exports import load
from sae.metrics import coherence
from sae.strict_json import as_json
from train.evaluate import evaluate_baselines, evaluate_dictionary
from train.fidelity import evaluate_fidelity
from train.imported import import_dictionary
from train.language import evaluate_language
from train.plan import make_plan
from train.progress import LiveTable
from train.run import train_sae


def make_dictionary(context: Context, out: Path) -> None:
    """Train the dictionary."""
    _train(context, out, context.folder / "activations.zarr", "train")


def make_twin_dictionary(context: Context, out: Path) -> None:
    """Train the twin's dictionary, in the same way."""
    _train(context, out, context.folder / "twin" / "activations.zarr", "train twin")


def check_imported(config: RunConfig) -> None:
    """Read the dictionary to import, so that what is wrong with it is said before anything is harvested for it.

    Raises
    ------
    CheckpointError
        It cannot be read.
    ConfigError
        No format of that name.
    """
    assert config.dictionary is not None
    load(config.dictionary.path.expanduser(), config.dictionary.format)


def make_imported(context: Context, out: Path) -> None:
    """Bring in a dictionary that was trained elsewhere."""
    config = context.config.dictionary
    assert config is not None
    store = context.folder / "activations.zarr"
    context.console.note(import_dictionary(store, config, out, hook=context.hook))


def make_evaluation(context: Context, out: Path) -> None:
    """Measure the dictionary that labels speak of."""
    context.console.note(_fidelity_note(context.config))
    record = measure(context, context.dictionary)
    measured = [split for split in ("discover", "confirm", "out_of_time") if split in record]
    for split in measured:
        context.console.note(_reconstruction_note(record, split))
    if not measured:
        context.console.note("nothing is measured: the store has no held-out rows")
    out.write_text(as_json(record, indent=1))


def measure(context: Context, name: str) -> dict[str, Any]:
    """Measure a dictionary on held-out entities, and what the model loses when it takes the activations' place."""
    store = ActivationStore.open(context.folder / "activations.zarr")
    sae = load_sae(context.folder / "sae" / name, context.world.device)
    record: dict[str, Any] = {"format_version": 1, "hook": context.hook}
    splits = [split for split in ("discover", "confirm", "out_of_time") if store.splits.get(split)]
    nearest = coherence(sae.W_dec)
    of_all = {"coherence": {"mean": float(nearest.mean()), "max": float(nearest.max())}}
    for split in splits:
        record[split] = evaluate_dictionary(store, sae, context.hook, split) | of_all
    if splits and store.splits.get("fit"):
        k = max(1, round(record[splits[0]]["l0"]))
        record["baselines"] = evaluate_baselines(store, context.hook, splits, k=k, seed=context.config.seed)
    if context.config.fits_model:
        model = load_model(context.folder / "model").to(context.world.device)
        assert context.config.evaluate is not None
        record["fidelity"] = evaluate_fidelity(
            model,
            context.folder / "panel",
            context.hook,
            sae=sae,
            mean=torch.from_numpy(store.moments(context.hook, "fit").mean),
            config=context.config.evaluate,
            seed=context.config.seed,
        )
    if _predicts_words(context.config):
        record["language"] = _evaluate_language(context, store, sae)
    return record


def _reconstruction_note(record: dict[str, Any], split: str) -> str:
    """Say how well the rows of a split are reconstructed, and what needs no training does at the same L0."""
    found = record[split]
    beside = [
        f"{name} {part[split]['fvu']:.3f}"
        for name, part in record.get("baselines", {}).items()
        if split in part
    ]
    # reconstructions that are not finite are an error
    fvu = f"{found['fvu']:.3f}" if math.isfinite(found["fvu"]) else "not defined (the rows do not vary)"
    text = f"{split}: FVU {fvu}, L0 {found['l0']:.1f}, dead {found['dead']:.1%}"
    return f"{text}; FVU at that L0 of {', '.join(beside)}" if beside else text


def _fidelity_note(config: RunConfig) -> str:
    """Say whether it is measured what the model loses, and why not where it is not."""
    if config.fits_model or _predicts_words(config):
        return "reconstruction on held-out rows, and what the model's predictions lose by it"
    if isinstance(config.source, TextSourceConfig) and isinstance(config.model, PretrainedConfig):
        why = f"model.architecture={config.model.architecture} predicts no next word, as AutoModelForCausalLM does"
    else:
        why = "that needs a model that the run fits, or one that predicts words (AutoModelForCausalLM)"
    return f"reconstruction on held-out rows; not what the model's predictions lose by it: {why}"


def _predicts_words(config: RunConfig) -> bool:
    return (
        isinstance(config.source, TextSourceConfig)
        and isinstance(config.model, PretrainedConfig)
        and config.model.architecture.endswith("ForCausalLM")
    )


def _evaluate_language(context: Context, store: ActivationStore, sae: SAE) -> dict[str, Any]:
    config = context.config
    assert config.evaluate is not None
    inputs = HarvestInputs(hooks=[context.hook], device=context.world.device, model=config.model)
    source = config.source.build(inputs=inputs)
    assert isinstance(source, ModelSource)
    return evaluate_language(
        source,
        context.hook,
        sae=sae,
        mean=torch.from_numpy(store.moments(context.hook, "fit").mean),
        n_bootstrap=config.evaluate.n_bootstrap,
        seed=config.seed,
    )


def _train(context: Context, out: Path, store: Path, stage: str) -> None:
    base = context.config.members[0]

    def progress(done: int, total: int, text: str) -> None:
        if done == 0:
            context.console.note(text)

    result = train_sae(
        store,
        base.sae,
        base.train,
        out,
        hook=context.hook,
        work=context.work(stage),
        seed=base.seed,
        world=context.world,
        progress=progress,
        watcher=LiveTable(context.console.rich, make_plan(base.train, base.sae).steps),
    )
    for line in result.advice:
        context.console.note(line)
