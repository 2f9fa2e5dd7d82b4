"""Training dictionaries and measuring them on held-out entities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from activations_cache.panel import Panel
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.store import ActivationStore
from assay.stages import Context
from sae.checkpoint import load_sae
from train.evaluate import evaluate_dictionary
from train.fidelity import evaluate_fidelity
from train.trainer import train_sae


def make_dictionary(context: Context, out: Path) -> None:
    """Train the dictionary."""
    _train(context, out, context.folder / "activations.zarr", "train")


def make_twin_dictionary(context: Context, out: Path) -> None:
    """Train the twin's dictionary, in the same way."""
    _train(context, out, context.folder / "twin" / "activations.zarr", "train twin")


def make_evaluation(context: Context, out: Path) -> None:
    """Measure the dictionary on held-out entities, and what the model loses when it takes the activations' place."""
    store = ActivationStore.open(context.folder / "activations.zarr")
    sae = load_sae(context.folder / "sae" / context.dictionary, context.world.device)
    record: dict[str, Any] = {"format_version": 1, "hook": context.hook}
    for split in ("discover", "confirm", "out_of_time"):
        if store.splits.get(split):
            record[split] = evaluate_dictionary(store, sae, context.hook, split)
    if context.config.fits_model:
        model = CreditTransformer.from_pretrained(context.folder / "model").eval().to(context.world.device)
        panel = Panel.open(context.folder / "panel")
        record["fidelity"] = evaluate_fidelity(model, panel, context.hook, sae, seed=context.config.seed)
    out.write_text(json.dumps(record, indent=1))


def _train(context: Context, out: Path, store: Path, stage: str) -> None:
    config = context.config
    assert config.sae is not None and config.train is not None
    with context.console.bar("steps") as bar:
        said: list[str] = []

        def progress(done: int, total: int, text: str) -> None:
            if not said and text:
                said.append(text)
                context.console.note(text.splitlines()[0])
            bar(done, total, text)

        result = train_sae(
            store,
            config.sae,
            config.train,
            out,
            hook=context.hook,
            work=context.work(stage),
            seed=config.seed,
            world=context.world,
            progress=progress,
        )
    for line in result.advice:
        context.console.note(line)
