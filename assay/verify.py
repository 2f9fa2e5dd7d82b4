"""Whether a run is damaged: every checksum there is, and that tables without one can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from activations_cache.panel import Panel
from activations_cache.places import Place, place_of
from activations_cache.store import ActivationStore
from label.bundle import CHECKSUMS, DICTIONARY, verify_bundle
from label.tables import SCHEMAS, read_summary, read_table
from sae.checkpoint import CONFIG, WEIGHTS, load_sae
from sae.errors import ConfigError, PanelError, StoreError, UserError

from .console import Console


def verify_run(run: Path, console: Console) -> None:
    """Check the stores, dictionaries, labels and bundle of a run, the twin's too, and say which show no damage.

    Raises
    ------
    UserError
        Some are damaged; all of them are named.
    """
    problems = []
    for part, check in _parts(run):
        problem = _complaint(check, run / part)
        if problem:
            problems.append(problem)
        else:
            console.say(f"  {part}: no damage")
    if problems:
        raise UserError(f"{run} is damaged\n" + "\n".join(problems))


def verify_store(place: Place) -> None:
    """Check every chunk; StoreError that names those which are damaged."""
    problems = ActivationStore.open(place, allow_incomplete=True).verify()
    if problems:
        raise StoreError(f"{place} is damaged\n  " + "\n  ".join(problems), do="harvest it again")


def verify_labels(labels: Path) -> None:
    """Read the summary and every table, which have no checksums; ConfigError that names those that are damaged."""
    problems = [_complaint(read_summary, labels), *(_complaint(read_table, labels, name) for name in SCHEMAS)]
    if any(problems):
        raise ConfigError("\n".join(filter(None, problems)))


def verify_panel(panel: Path) -> None:
    """Read the panel, which has no checksums; PanelError where that cannot be done."""
    try:
        Panel.open(panel)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise PanelError(
            f"the panel {panel} is damaged", got=" ".join(str(error).split()), do="remove it, and run again"
        ) from error


def _complaint(check: Callable[..., object], *arguments: object) -> str:
    """Return what a check says is wrong; nothing where all is right."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return ""


def _parts(run: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    for folder in ("", "twin/"):
        if (run / f"{folder}activations.zarr").exists():
            yield f"{folder}activations.zarr", lambda path: verify_store(place_of(path))
        # hidden ones are still being written, and others' folders are none of ours
        for path in sorted(run.glob(f"{folder}sae/[!.]*/")):
            if any((path / name).is_file() for name in (CONFIG, WEIGHTS)):
                yield str(path.relative_to(run)), load_sae
    for name, files, check in (
        ("panel", ["profile.json"], verify_panel),
        ("labels", ["summary.json"], verify_labels),
        ("dictionary", [CHECKSUMS, DICTIONARY], verify_bundle),
    ):
        if any((run / name / file).is_file() for file in files):
            yield name, check
