"""The stages of a run: what each reads of the configuration, after which stages it comes, what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activations_cache.tables import find_files
from train.sizes import AutoSAEConfig

from .config import RunConfig
from .stages import Context, Stage
from .steps.concepts import check_concepts, make_concepts
from .steps.dictionary import (
    check_imported,
    make_dictionary,
    make_evaluation,
    make_imported,
    make_twin_dictionary,
)
from .steps.labels import make_labels, make_report
from .steps.model import make_model, make_panel, make_reference, make_twin_model
from .steps.sizes import make_sizes, settle_sizes
from .steps.store import erasures, make_store, make_twin_store, prove_source, prove_twin_source
from .steps.sweep import SWEEP, make_sweep, make_sweep_evaluation, member_folders


def _panel_files(config: RunConfig) -> Sequence[Path]:
    if config.panel is None or config.panel.path is None:
        return ()
    return find_files([config.panel.path] if isinstance(config.panel.path, str) else config.panel.path)


def _source_files(config: RunConfig) -> Sequence[Path]:
    model = () if config.model is None else config.model.files()
    return [*config.source.files(), *model]


def _concept_files(config: RunConfig) -> Sequence[Path]:
    if config.concepts is None:
        return ()
    files = [Path(p) for p in config.concepts.paths]
    for table in config.concepts.tables:
        files += [Path(p) for p in (table.path, table.meta) if p is not None and "{run}" not in p]
    return files


def _sections(*names: str) -> Any:
    def read(config: RunConfig) -> dict[str, Any]:
        tree = config.to_dict()
        return {name: tree[name] for name in names}

    return read


def _harvesting(*names: str) -> Any:
    """Return a function that reads the sections, and the version of the source where it is not the first."""
    sections = _sections(*names)

    def read(config: RunConfig) -> dict[str, Any]:
        version = config.source.version
        return {**sections(config), **({"source version": version} if version > 1 else {})}

    return read


def _sizing(config: RunConfig) -> dict[str, Any]:
    """Return what the sample of rows depends on; which numbers are open does not matter."""
    assert config.train is not None
    train = config.train.what_is_learned()
    return {"hook": train["hook"], "loader": train["loader"], "seed": config.seed}


def _training(config: RunConfig) -> dict[str, Any]:
    base = config.members[0]
    return {"sae": base.sae.to_dict(), "train": base.train.what_is_learned(), "seed": base.seed}


def _all_training(config: RunConfig) -> dict[str, Any]:
    more = {m.name: {"sae": m.sae.to_dict(), "lr": m.train.lr, "seed": m.seed} for m in config.members[1:]}
    return {**_training(config), **({"sweep": more} if more else {})}


def _swept(many: Any, one: Any) -> Any:
    """Return a function of a context, and maybe more, that is `many` where a sweep is asked for."""
    return lambda context, *rest: (one if context.config.sweep is None else many)(context, *rest)


def _member_evaluations(context: Context) -> Sequence[Path]:
    return [folder / "evaluation.json" for folder in member_folders(context)]


def _has(*names: str) -> Any:
    return lambda config: all(getattr(config, name) is not None for name in names)


def _wants_twin(*names: str) -> Any:
    return lambda c: c.twin and c.fits_model and all(getattr(c, n) is not None for n in names)


def _at(*parts: str) -> Any:
    return lambda context: context.folder.joinpath(*parts)


def _erasures(*parts: str) -> Any:
    """Return a function of a context that lists what was erased from a store since it was harvested."""
    return lambda context: erasures(context.folder.joinpath(*parts))


STAGES = (
    Stage("reference", 2, _has("reference"), _sections("reference"), (), _at("reference"), make_reference),
    Stage(
        "panel", 4, _has("panel"), _sections("panel"), ("reference",), _at("panel"), make_panel, _panel_files
    ),
    Stage("fit", 2, _has("fit"), _sections("model", "fit", "seed"), ("panel",), _at("model"), make_model),
    Stage(
        "harvest",
        1,
        _has("harvest"),
        _harvesting("source", "model", "harvest", "seed"),
        ("panel", "fit"),
        _at("activations.zarr"),
        make_store,
        _source_files,
        proves=prove_source,
        in_place=True,
        together=True,
        amended=_erasures("activations.zarr"),
    ),
    Stage(
        "size",
        5,
        lambda c: c.train is not None and isinstance(c.sae, AutoSAEConfig),
        _sizing,
        ("harvest",),
        _at("size.json"),
        make_sizes,
        settles=settle_sizes,
    ),
    Stage(
        "train",
        3,
        _has("train"),
        _all_training,
        ("harvest", "size"),
        lambda c: c.folder / "sae" / c.dictionary,
        _swept(make_sweep, make_dictionary),
        beside=_swept(member_folders, lambda _: ()),
        together=True,
    ),
    Stage(
        "import",
        2,
        _has("dictionary"),
        _sections("dictionary"),
        ("harvest",),
        lambda c: c.folder / "sae" / c.dictionary,
        make_imported,
        lambda c: () if c.dictionary is None else c.dictionary.files(),
        check_imported,
    ),
    Stage(
        "twin", 1, _wants_twin("train"), _sections("seed"), ("fit",), _at("twin", "model"), make_twin_model
    ),
    Stage(
        "harvest twin",
        1,
        _wants_twin("train"),
        _harvesting("source", "harvest", "seed"),
        ("panel", "twin"),
        _at("twin", "activations.zarr"),
        make_twin_store,
        proves=prove_twin_source,
        in_place=True,
        together=True,
        amended=_erasures("twin", "activations.zarr"),
    ),
    Stage(
        "train twin",
        3,
        _wants_twin("train"),
        _training,
        ("harvest twin", "harvest"),
        lambda c: c.folder / "twin" / "sae" / c.dictionary,
        make_twin_dictionary,
        together=True,
    ),
    Stage(
        "evaluate",
        6,
        _has("evaluate"),
        _sections("seed", "evaluate"),
        ("train", "import"),
        _swept(_at("sae", SWEEP), lambda c: c.folder / "sae" / c.dictionary / "evaluation.json"),
        _swept(make_sweep_evaluation, make_evaluation),
        beside=_swept(_member_evaluations, lambda _: ()),
    ),
    Stage(
        "concepts",
        4,
        _has("concepts"),
        _sections("concepts"),
        ("panel", "reference", "harvest"),
        _at("concepts"),
        make_concepts,
        _concept_files,
        check_concepts,
    ),
    Stage(
        "label",
        9,
        _has("label"),
        _sections("label", "seed", "twin"),
        ("train", "import", "train twin", "evaluate", "concepts"),
        _at("labels"),
        make_labels,
    ),
    Stage("report", 3, _has("label"), lambda _: {}, ("label",), _at("report"), make_report),
)
