"""What a folder holds and whether it is whole; and the table that ends a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from activations_cache.places import Place, place_of
from activations_cache.schema import Description
from label.decide import REASONS
from label.tables import read_summary, read_table
from sae.errors import ConfigError, UserError
from train.frontier import SWEEP, as_table, read_sweep

from .console import Console
from .freshness import read_record

N_SHOWN = 20
RIGHT = "[green]every checksum is right[/]"
READ = "[green]every table can be read[/]; there are no checksums of them"


def read_run(folder: Path) -> dict[str, Any]:
    """Return run.json.

    Raises
    ------
    UserError
        The folder is no run.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no run folder", got="no run.json in it", expected="what `assay run` wrote to out"
        )
    run = read_record(path)
    lost = [name for name in ("name", "config", "versions") if name not in run]
    if lost:
        raise UserError(f"{path} is no record of a run", got=f"no {', '.join(lost)} in it")
    return run


def inspect(location: str | Path, console: Console, *, verify: bool = False) -> None:
    """Print what a run, a store, a dictionary, a labels folder or a bundle holds.

    Raises
    ------
    UserError
        The path is nothing of ours, or damaged.
    """
    place = place_of(location)
    if (place / "zarr.json").size() is not None:
        _inspect_store(place, console, verify)
        return
    path = Path(location)
    kinds: list[tuple[str, Callable[[Path, Console, bool], None]]] = [
        ("run.json", _inspect_run),
        ("dictionary.json", _inspect_bundle),
        ("summary.json", _inspect_labels),
        ("weights.safetensors", _inspect_dictionary),
        ("profile.json", _inspect_panel),
    ]
    for file, show in kinds:
        if (path / file).is_file():
            show(path, console, verify)
            return
    raise UserError(
        f"cannot tell what {location} is" if path.exists() else f"there is nothing at {location}",
        expected="a run, a store, a dictionary, a labels folder, a panel or a bundle",
    )


def show_run(folder: Path, console: Console) -> None:
    """Print what a run found, headline first, and where everything lies."""
    from label.bundle import labelled_dictionary

    run = read_run(folder)
    labels = folder / "labels"
    if (labels / "summary.json").is_file():
        show_labels(labels, console)
        try:
            labelled_dictionary(folder, run)
        except ConfigError as error:
            console.say(f"\nNote: {error}")
    sweep = folder / "sae" / SWEEP
    if run["config"].get("sweep") is not None and sweep.is_file():
        console.print("", as_table(*read_sweep(sweep)), escape(f"drawn in {sweep.with_suffix('.svg')}"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, stage in run["stages"].items():
        # a stage before it may have run again since, and replaced the folder that its output was in
        if stage.get("output") and (folder / stage["output"]).exists():
            table.add_row(
                name, f"[dim]{stage.get('seconds', 0):,.1f} s[/]", escape(str(folder / stage["output"]))
            )
    console.print("\n[bold]Where everything lies[/]")
    console.print(table)
    console.say(f"\nDone: {folder}. Next: {_pages_of(folder, run)}{_export_of(folder, run)}")


def _pages_of(folder: Path, run: dict[str, Any]) -> str:
    """Return what to do to see the run: open its pages, or write them where they are of other labels."""
    from label.report.write import shows_present_labels

    page = folder / "report" / "index.html"
    if not page.is_file():
        return f"assay inspect {folder}"
    if shows_present_labels(page.parent, run):
        return f"open {page}"
    return (
        f"assay report {folder} (the pages in {page.parent} are of earlier labels or of an earlier version)"
    )


def _export_of(folder: Path, run: dict[str, Any]) -> str:
    """Return the command that exports what a run has, after a semicolon; nothing where it has no dictionary."""
    if (folder / "labels" / "summary.json").is_file():
        return f"; assay export {folder}"
    trained = any(run["stages"].get(name, {}).get("output") for name in ("train", "import"))
    return f"; assay export {folder} --format saelens" if trained else ""


def show_labels(labels: Path, console: Console) -> None:
    """Print the headline, the strongest labels, why the rest has none, and how faithful the dictionary is."""
    summary = read_summary(labels)
    console.print(
        f"\n[bold]{summary['n_learned_and_used']} features are labelled, learned and used[/]; "
        f"{summary['n_used']} labelled and used; {summary['n_learned']} labelled and learned; "
        f"{summary['n_labelled']} labelled of {summary['n_features']:,}"
    )
    console.print(_strongest(labels))
    reasons = sorted(summary["reasons"].items(), key=lambda item: -item[1])
    console.print("\n[bold]Unlabelled[/], by the first reason that applies")
    for reason, count in reasons:
        console.print(f"  {count:>6,}  {reason}: {REASONS[reason]}")
    console.print(
        "\n[bold]Concepts[/] with the best feature, the untrained twin and the best raw column (skill)"
    )
    console.print(_baselines(summary))
    _show_checks(summary, console)


def _strongest(labels: Path) -> Table:
    rows = [r for r in read_table(labels, "features").to_pylist() if r["status"] == "labelled"]
    rows.sort(key=lambda r: (not (r["learned"] and r["used"]), not r["used"], not r["learned"], -r["skill"]))
    table = Table(
        title=f"Strongest {min(N_SHOWN, len(rows))} of {len(rows)} labelled features", title_justify="left"
    )
    for name in (
        "feature",
        "fires when",
        "learned",
        "used",
        "skill",
        "F1",
        "prec.",
        "recall",
        "prev.",
        "entities",
    ):
        if name == "fires when":
            table.add_column(name, ratio=1, min_width=24)
        else:
            table.add_column(
                name, justify="left" if name in ("learned", "used", "skill") else "right", no_wrap=True
            )
    for r in rows[:N_SHOWN]:
        table.add_row(
            str(r["feature"]),
            escape(r["title"]),
            _verdict(r["learned"]),
            _verdict(r["used"]),
            escape(f"{r['skill']:.2f} [{r['skill_low']:.2f}, {r['skill_high']:.2f}]"),
            *(f"{r[name]:.2f}" for name in ("f1", "precision", "recall")),
            f"{r['prevalence']:.1%}",
            f"{r['n_entities']:,}",
        )
    return table


def _baselines(summary: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("concept", "feature", "skill", "twin", "raw", "F1", "prevalence"):
        table.add_column(name, justify="left" if name == "concept" else "right")
    baselines = summary["baselines"]
    for concept, best in sorted(summary["concepts"].items(), key=lambda item: -item[1]["skill"])[:N_SHOWN]:
        table.add_row(
            escape(concept),
            str(best["feature"]),
            f"{best['skill']:.2f}",
            _number(baselines.get("twin", {}).get(concept)),
            _number(baselines.get("raw_column", {}).get(concept)),
            f"{best['f1']:.2f}",
            f"{best['prevalence']:.1%}",
        )
    return table


def _show_checks(summary: dict[str, Any], console: Console) -> None:
    fidelity, check, controls = summary["fidelity"], summary["test_calibration"], summary["controls"]
    console.print("\n[bold]Checks[/]")
    # labels of an earlier version were tested in another way
    plain = check.get("plain_rejected_at_0.05")
    alone = f"; by a normal distribution {_number(plain, 3)}" if plain is not None else ""
    console.print(
        f"  negative controls labelled by the same rule: {', '.join(f'{k} {v}' for k, v in controls.items())}; "
        f"score test rejects {_number(check['rejected_at_0.05'], 3)} at 0.05 under permutation "
        f"(inflation {check['inflation']:.2f}{alone})"
    )
    removal = summary["removal"]
    if removal is not None:
        console.print(
            f"  removing all {summary['n_used']} used features together moves the default logit by "
            f"{removal['used_together']:.3g}; removing every feature by {removal['all_features']:.3g}"
        )
    if fidelity.get("fvu") is not None:
        console.print(
            f"  dictionary on confirm entities: FVU {fidelity['fvu']:.3f}, L0 {fidelity['l0']:.1f}, "
            f"never firing there {fidelity['dead']:.1%}"
        )
    if fidelity.get("auc_model") is not None:
        console.print(
            f"  default AUC {fidelity['auc_model']:.4f}; with the reconstruction spliced in "
            f"{fidelity['auc_spliced']:.4f} (mean |dPD| {fidelity['mean_abs_dpd']:.4f}); gradient boosting on the same "
            f"columns {_number(fidelity.get('auc_reference'), 4)}"
        )


def _inspect_run(path: Path, console: Console, verify: bool) -> None:
    run = read_run(path)
    console.print(
        f"[bold]{escape(run['name'])}[/], versions {', '.join(f'{k} {v}' for k, v in run['versions'].items())}"
    )
    for name, stage in run["stages"].items():
        if not stage.get("output"):
            console.print(f"  [yellow]{name} is unfinished[/]: run the same command again")
    if verify:
        from .verify import verify_run

        verify_run(path, console)
    show_run(path, console)


def _inspect_labels(path: Path, console: Console, verify: bool) -> None:
    if verify:
        from .verify import verify_labels

        verify_labels(path)
        console.print(READ)
    show_labels(path, console)


def _inspect_store(path: Place, console: Console, verify: bool) -> None:
    from activations_cache.store import ActivationStore

    store = ActivationStore.open(path, allow_incomplete=True)
    size = sum(path.sizes().values())
    console.print(
        f"[bold]{escape(str(path))}[/]: {'complete' if store.complete else 'incomplete, its harvest has not ended'}"
    )
    console.print(f"  {store.n_rows:,} rows, {len(store.entity_codes()):,} entities, {size / 1e6:,.1f} MB")
    console.print("  " + ", ".join(f"{s} {n:,}" for s, n in store.splits.items()))
    for hook, width in store.hooks.items():
        line = f"  {hook}: d_in {width}, {store.description.dtype}"
        if store.complete and store.splits.get("fit"):
            moments = store.moments(hook, "fit")
            line += f", root mean variance {moments.scale:.4g}, median norm {moments.norm_quantile(0.5):.4g}"
        console.say(line)
    for line in _origin_lines(store.description):
        console.say(line)
    if verify:
        from .verify import verify_store

        verify_store(path)
        console.print(f"  {RIGHT}")


def _origin_lines(description: Description) -> Iterator[str]:
    """Yield what a store says of itself: where it comes from, what may be done with it, who was erased."""
    for name, value in description.provenance.items():
        left = len(value) - N_SHOWN if isinstance(value, dict) else 0
        shown = dict(list(value.items())[:N_SHOWN]) if left > 0 else value
        more = f" and {left:,} more, in zarr.json" if left > 0 else ""
        yield f"  {name}: {shown if isinstance(shown, str) else json.dumps(shown)}{more}"
    yield f"  data licence: {description.data_licence or 'none noted'}"
    yield f"  to be deleted after: {description.retain_until or 'no date noted'}"
    for entry in description.erasures:
        yield f"  erased on {entry['date']}: {entry['entities']:,} entities, {entry['rows']:,} rows"


def _inspect_dictionary(path: Path, console: Console, verify: bool) -> None:
    from sae.checkpoint import load_sae, read_header

    # which reads the checksum whether it was asked for or not
    load_sae(path)
    if verify:
        console.print(RIGHT)
    console.rich.print_json(json.dumps(read_header(path)))
    if (path / "evaluation.json").is_file():
        console.rich.print_json((path / "evaluation.json").read_text())


def _inspect_panel(path: Path, console: Console, verify: bool) -> None:
    from activations_cache.panel import read_profile

    from .steps.model import profile_lines

    if verify:
        from .verify import verify_panel

        verify_panel(path)
        console.print(READ)
    for line in profile_lines(read_profile(path)):
        console.say(line)


def _inspect_bundle(path: Path, console: Console, verify: bool) -> None:
    from label.bundle import verify_bundle

    if verify:
        verify_bundle(path)
        console.print(RIGHT)
    console.rich.print_json((path / "dictionary.json").read_text())


def _verdict(value: bool | None) -> str:
    return {True: "[green]yes[/]", False: "no", None: "[dim]?[/]"}[value]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
