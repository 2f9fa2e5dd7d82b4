"""What the stages of a run do: each hands files from one room to the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from activations_cache.harvest import HarvestProgress, estimate, harvest, weights_hash
from activations_cache.panel import Panel, find_files, prepare, read_profile
from activations_cache.reference.credit_transformer import CreditTransformer
from activations_cache.reference.fit import FitProgress, ModelShape, evaluate, fit, reinitialised
from activations_cache.reference.generator import generate
from activations_cache.sources.base import ActivationSource, HarvestInputs
from activations_cache.splits import SplitConfig
from activations_cache.store import ActivationStore
from label.concepts.evaluation import evaluate_concepts
from label.concepts.language import ConceptInfo, NotApplicable, load_concepts
from label.concepts.tables import load_concept_table
from label.run import LabelInputs, label_dictionary
from sae.checkpoint import load_sae
from sae.errors import ConceptError, ConfigError
from train.evaluate import evaluate_dictionary
from train.fidelity import evaluate_fidelity
from train.trainer import train_sae

from .config import RunConfig
from .stages import Context, Stage

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
    model = CreditTransformer.from_pretrained(context.folder / "model")
    reinitialised(model, context.config.seed + TWIN_SEED).save_pretrained(out)


def make_store(context: Context, out: Path) -> None:
    """Harvest the model's activations."""
    _harvest(context, out, context.folder / "model")


def make_twin_store(context: Context, out: Path) -> None:
    """Harvest the twin's activations."""
    _harvest(context, out, context.folder / "twin" / "model")


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


def make_concepts(context: Context, out: Path) -> None:
    """Evaluate the concepts on every row of the panel."""
    config = context.config.concepts
    assert config is not None
    out.mkdir()
    panel, entities = _rows_for_concepts(context, out)
    tables: list[dict[str, Any]] = []
    skipped: list[NotApplicable] = []
    if config.paths and context.config.panel is not None and context.config.reads_panel:
        library = load_concepts([Path(p) for p in config.paths])
        fit_, skipped = library.applicable(context.config.panel.product, list(context.config.panel.columns))
        labels = [c for c in fit_ if c.kind != "outcome"]
        skipped += [
            NotApplicable(c.id, "it looks ahead, so it never makes a label")
            for c in fit_
            if c.kind == "outcome"
        ]
        if labels:
            report = evaluate_concepts(
                labels,
                panel,
                out / "values.parquet",
                timeout_s=config.timeout_s,
                memory_limit=config.memory_limit,
                threads=torch.get_num_threads(),
            )
            context.console.note(
                f"{len(labels)} concepts on {report.rows:,} rows; {len(skipped)} not applicable"
            )
        fields = set(ConceptInfo.model_fields)
        tables.append(
            {
                "file": "values.parquet",
                "concepts": [c.model_dump(include=fields, mode="json") for c in labels],
            }
        )
        (out / "expressions.json").write_text(json.dumps({c.id: c.expr for c in labels}, indent=1))
    for i, table in enumerate(config.tables):
        file = f"table_{i}.parquet"
        infos = load_concept_table(
            _inside(context, table.path),
            out / file,
            panel=panel,
            entities=entities,
            entity=table.entity,
            time=table.time,
            meta=None if table.meta is None else _inside(context, table.meta),
        )
        infos = [info for info in infos if any(fnmatch(info.id, glob) for glob in table.only)]
        tables.append({"file": file, "concepts": [info.to_dict() for info in infos]})
    _refuse_repeats([c["id"] for t in tables for c in t["concepts"]])
    record = {"format_version": 1, "tables": tables, "not_applicable": [list(s) for s in skipped]}
    (out / "concepts.json").write_text(json.dumps(record, indent=1))


def make_labels(context: Context, out: Path) -> None:
    """Label every feature."""
    config, folder = context.config, context.folder
    assert config.label is not None
    record = json.loads((folder / "concepts" / "concepts.json").read_text())
    twin = folder / "twin"
    has_twin = config.twin and config.fits_model
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
        run=json.loads((context.folder / "run.json").read_text()),
        evaluation=_evaluation(context),
    )


def profile_lines(profile: dict[str, Any]) -> list[str]:
    """Return a panel's profile in a few lines."""
    length = profile["rows_per_entity"]
    lines = [
        f"{profile['rows']:,} rows, {profile['entities']:,} entities, periods {profile['first_period']} to "
        f"{profile['last_period']}, {length[0]} to {length[4]} rows each (median {length[2]}), {profile['gaps']:,} gaps",
        ", ".join(f"{name} {s['entities']:,}" for name, s in profile["splits"].items() if s["entities"])
        + " entities",
    ]
    missing = {n: c["missing"] for n, c in profile["column_profile"].items() if c["missing"] > 0}
    if missing:
        lines.append("missing: " + ", ".join(f"{n} {m:.1%}" for n, m in missing.items()))
    if profile["outcome_rate"] is not None:
        lines.append(f"outcome 1 on {profile['outcome_rate']:.2%} of {profile['outcome_known']:,}")
    return lines


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


def _rows_for_concepts(context: Context, out: Path) -> tuple[Path, Path]:
    """Return the files that say which rows and entities there are; without a panel they come from the store."""
    if context.config.reads_panel:
        return context.folder / "panel" / "panel.parquet", context.folder / "panel" / "entities.parquet"
    store = ActivationStore.open(context.folder / "activations.zarr")
    parts = [store.coordinates(split) for split, rows in store.splits.items() if rows]
    entity, time = (np.concatenate([p[i] for p in parts]) for i in (0, 2))
    # several rows may share a time, such as events of one day
    rows = np.unique(np.stack([entity, time], axis=1), axis=0)
    pq.write_table(pa.table({"entity": rows[:, 0], "time": rows[:, 1]}), out / "rows.parquet")
    pq.write_table(store.entity_ids(), out / "entities.parquet")
    return out / "rows.parquet", out / "entities.parquet"


def _inside(context: Context, path: str) -> Path:
    """Return a path of the configuration; `{run}` stands for the run folder."""
    found = Path(path.replace("{run}", str(context.folder))).expanduser()
    if not found.is_file():
        raise ConfigError(
            f"concepts.tables: no file at {found}", do="check the path; {run} stands for the run folder"
        )
    return found


def _refuse_repeats(ids: Sequence[str]) -> None:
    repeated = sorted({i for i in ids if ids.count(i) > 1})
    if repeated:
        raise ConceptError(
            f"concepts with the same id in several files: {', '.join(repeated)}",
            do="leave one of them out, with concepts.tables[].only for a table",
        )


def _evaluation(context: Context) -> dict[str, Any] | None:
    path = context.folder / "sae" / context.dictionary / "evaluation.json"
    return json.loads(path.read_text()) if path.is_file() else None


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


def _has(*names: str) -> Any:
    return lambda config: all(getattr(config, name) is not None for name in names)


def _wants_twin(*names: str) -> Any:
    return lambda c: c.twin and c.fits_model and all(getattr(c, n) is not None for n in names)


def _at(*parts: str) -> Any:
    return lambda context: context.folder.joinpath(*parts)


STAGES = (
    Stage("reference", 1, _has("reference"), _sections("reference"), (), _at("reference"), make_reference),
    Stage(
        "panel", 1, _has("panel"), _sections("panel"), ("reference",), _at("panel"), make_panel, _panel_files
    ),
    Stage("fit", 1, _has("fit"), _sections("model", "fit", "seed"), ("panel",), _at("model"), make_model),
    Stage(
        "harvest",
        1,
        _has("harvest"),
        _sections("source", "model", "harvest", "seed"),
        ("panel", "fit"),
        _at("activations.zarr"),
        make_store,
        _source_files,
        in_place=True,
    ),
    Stage(
        "train",
        1,
        _has("train"),
        _sections("sae", "train", "seed"),
        ("harvest",),
        lambda c: c.folder / "sae" / c.dictionary,
        make_dictionary,
    ),
    Stage(
        "twin", 1, _wants_twin("train"), _sections("seed"), ("fit",), _at("twin", "model"), make_twin_model
    ),
    Stage(
        "harvest twin",
        1,
        _wants_twin("train"),
        _sections("source", "harvest", "seed"),
        ("panel", "twin"),
        _at("twin", "activations.zarr"),
        make_twin_store,
        in_place=True,
    ),
    Stage(
        "train twin",
        1,
        _wants_twin("train"),
        _sections("sae", "train", "seed"),
        ("harvest twin", "harvest"),
        lambda c: c.folder / "twin" / "sae" / c.dictionary,
        make_twin_dictionary,
    ),
    Stage(
        "evaluate",
        1,
        _has("evaluate"),
        _sections("seed"),
        ("train",),
        lambda c: c.folder / "sae" / c.dictionary / "evaluation.json",
        make_evaluation,
    ),
    Stage(
        "concepts",
        1,
        _has("concepts"),
        _sections("concepts"),
        ("panel", "reference", "harvest"),
        _at("concepts"),
        make_concepts,
        _concept_files,
    ),
    Stage(
        "label",
        2,
        _has("label"),
        _sections("label", "seed", "twin"),
        ("train", "train twin", "evaluate", "concepts"),
        _at("labels"),
        make_labels,
    ),
    Stage("report", 1, _has("label"), lambda _: {}, ("label",), _at("report"), make_report),
)
