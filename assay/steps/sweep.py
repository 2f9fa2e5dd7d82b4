"""Training and measuring the dictionaries of a sweep."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

from assay.stages import Context
from sae.checkpoint import write_atomically
from sae.errors import StoreError
from sae.strict_json import as_json
from train.frontier import SWEEP, Point, as_svg, own_seconds, write_sweep
from train.plan import make_plan
from train.progress import LiveTable
from train.run import Run, train_saes
from train.trainer import METRICS

from .dictionary import measure

__all__ = ["SWEEP", "make_sweep", "make_sweep_evaluation", "member_folders"]


def make_sweep(context: Context, out: Path) -> None:
    """Train all dictionaries on the same batches: that of section sae into `out`, the others beside it."""
    members, hook = context.config.members, context.hook
    finals = [out, *member_folders(context)[1:]]
    places = [out, *(final.with_name(f".{final.name}.part") for final in finals[1:])]
    runs = [
        Run(m.sae, m.train, m.seed, out=place, work=context.work("train") / m.name)
        for m, place in zip(members, places, strict=True)
    ]

    def progress(done: int, total: int, text: str) -> None:
        if done == 0:
            context.console.note(text)

    steps = make_plan(members[0].train, members[0].sae).steps
    runs[0] = replace(runs[0], watcher=LiveTable(context.console.rich, steps))
    results = train_saes(
        context.folder / "activations.zarr",
        runs,
        hook=hook,
        row_seed=context.config.seed,
        world=context.world,
        progress=progress,
    )
    for member, result in zip(members, results, strict=True):
        for line in result.advice:
            context.console.note(f"{member.name}: {line}")
    if context.world.is_main:
        for place, final in zip(places[1:], finals[1:], strict=True):
            shutil.rmtree(final, ignore_errors=True)
            place.replace(final)


def make_sweep_evaluation(context: Context, out: Path) -> None:
    """Measure all dictionaries on held-out entities; write what they came to as a table and a drawing.

    Raises
    ------
    StoreError
        The store has no held-out rows, or none that vary.
    """
    points, split = [], ""
    for folder in member_folders(context):
        record = measure(context, folder.name)
        held_out = [name for name in ("confirm", "discover", "out_of_time") if name in record]
        if not held_out:
            raise StoreError("a sweep compares dictionaries on held-out rows", got="none in the store")
        split = held_out[0]
        write_atomically(folder / "evaluation.json", as_json(record, indent=1).encode())
        fvu, l0, dead = (record[split][name] for name in ("fvu", "l0", "dead"))
        if not math.isfinite(fvu):
            raise StoreError(
                "a sweep compares dictionaries on held-out rows",
                got=f"rows of {split} that do not vary",
            )
        points.append(Point(folder.name, fvu, l0, dead, own_seconds(folder / METRICS)))
    drawing = (context.folder / "sae" / SWEEP).with_suffix(".svg")
    write_atomically(drawing, as_svg(points, split).encode())
    write_sweep(points, split, out)


def member_folders(context: Context) -> list[Path]:
    """Return where the dictionaries of a run lie, that of section sae first."""
    return [context.folder / "sae" / f"{context.hook}-{member.name}" for member in context.config.members]
