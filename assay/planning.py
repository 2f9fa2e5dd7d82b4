"""`assay train CONFIG --plan`: what the training would take, without beginning it."""

from __future__ import annotations

import torch
from rich.table import Table

from activations_cache.store import ActivationStore
from sae.errors import ConfigError
from sae.world import find_device
from train.calibration import calibrate
from train.machines import GPUS, Machine, probe
from train.plan import DEAD_SHARE
from train.planner import Estimate, Job, Mesh, choose, describe
from train.progress import duration
from train.run import SPLIT, choose_hook
from train.sizes import AutoSAEConfig, measure_sizes

from .config import RunConfig
from .console import Console

HERE = "here"
"""The machine that plans, measured by a short probe."""


def show_plan(config: RunConfig, console: Console, *, gpus: int, gpu: str, d_in: int | None) -> None:
    """Print memory, traffic, time and the mesh to choose.

    Parameters
    ----------
    config
        The run; its harvested store says how wide and how many the rows are, where there is one.
    console
        The screen.
    gpus
        Ranks to plan for.
    gpu
        `here`, or a GPU of the table.
    d_in
        Width of the activations where nothing is harvested yet.

    Raises
    ------
    ConfigError
        No dictionary is trained, the width is not known, or no mesh of so many ranks fits.
    """
    if gpus < 1:
        raise ConfigError("there is nothing to plan for", got=f"--gpus {gpus}", expected="1 or more")
    job = _job(config, d_in)
    machine = _measured(job, find_device(config.device), gpus) if gpu == HERE else GPUS[gpu]
    chosen, weighed = choose(job, machine, gpus)
    asked = config.train.mesh if config.train is not None else None
    given = None if asked is None or asked.feature == 1 else Mesh(gpus // asked.feature, asked.feature)
    console.print(_memory(chosen, machine))
    console.print(_traffic(chosen))
    console.print(_meshes(weighed, chosen, given, job))
    console.note(_summary(chosen, job, machine))


def _measured(job: Job, device: torch.device, ranks: int) -> Machine:
    return calibrate(probe(device, ranks=ranks), job, device, ranks=ranks)


def _job(config: RunConfig, d_in: int | None) -> Job:
    if config.sae is None or config.train is None:
        raise ConfigError("this configuration trains no dictionary", expected="sections sae and train")
    if config.sweep is not None:
        raise ConfigError(
            "--plan weighs one dictionary at a time",
            got="a section sweep",
            do="plan each with sweep=null and its settings, and train.rows of the largest: memory and seconds add up",
        )
    place = config.out.expanduser().absolute() / "activations.zarr"
    if place.exists():
        store = ActivationStore.open(place)
        hook = choose_hook(config.train, store.hooks)
        sae = config.sae
        if isinstance(sae, AutoSAEConfig):
            found = measure_sizes(place, hook, seed=config.seed, settings=config.train.loader)
            sae = sae.sized(found.d_sae, found.k)
        width, rows = store.hooks[hook], store.splits.get(SPLIT)
        if d_in not in (None, width):
            raise ConfigError("the store has another width", got=f"--d-in {d_in}", expected=str(width))
        size = store.description.arrays()[hook].row_bytes
        return describe(sae, config.train, d_in=width, row_bytes=size, split_rows=rows)
    if isinstance(config.sae, AutoSAEConfig):
        raise ConfigError(
            "sae.d_sae and sae.k are not known before the harvest where they are auto",
            got=f"no store in {config.out}",
            do="harvest first, or give both: sae.d_sae=N sae.k=N",
        )
    if d_in is None:
        raise ConfigError(
            "the width of the activations is not known before the harvest",
            got=f"no store in {config.out}",
            do="harvest first, or give --d-in WIDTH",
        )
    if d_in < 1:
        raise ConfigError("no activations are so wide", got=f"--d-in {d_in}", expected="1 or more")
    return describe(config.sae, config.train, d_in=d_in)


def _memory(found: Estimate, machine: Machine) -> Table:
    table = _table(f"memory of a rank, data {found.mesh.data} x feature {found.mesh.feature}", "part", "GiB")
    for name, size in found.device.items():
        table.add_row(name, _gib(size))
    table.add_row(f"sum, of {_gib(machine.memory)} of {machine.name}", _gib(sum(found.device.values())))
    for name, size in found.host.items():
        table.add_row(f"host: {name}", _gib(size))
    table.add_row("host: at the end, on the first rank", _gib(found.end))
    return table


def _traffic(found: Estimate) -> Table:
    table = _table("a step of a rank", "what", "MB", "ms")
    for axis, size in found.sent.items():
        where = "over all ranks" if axis == "all" else f"sent along {axis}"
        table.add_row(where, f"{size / 1e6:,.1f}", f"{1e3 * found.seconds[f'{axis} axis']:,.2f}")
    table.add_row("read from the store", f"{found.read / 1e6:,.1f}", f"{1e3 * found.seconds['reading']:,.2f}")
    for part in ("product", "memory"):
        table.add_row(part, "", f"{1e3 * found.seconds[part]:,.2f}")
    return table


def _meshes(weighed: list[Estimate], chosen: Estimate, given: Mesh | None, job: Job) -> Table:
    table = _table("meshes", "data x feature", "device GiB", "host GiB", "rows/s", "")
    for found in weighed:
        note = "chosen" if found is chosen else "" if found.fits else "does not fit"
        note += " (configured)" if found.mesh == given else ""
        table.add_row(
            f"{found.mesh.data} x {found.mesh.feature}",
            _gib(sum(found.device.values())),
            _gib(found.peak_host),
            f"{job.plan.batch_size / found.step_seconds:,.0f}",
            note,
        )
    return table


def _summary(chosen: Estimate, job: Job, machine: Machine) -> str:
    seconds = chosen.step_seconds
    origins = ", ".join(f"{name} {origin}" for name, origin in machine.sources.items())
    return (
        f"{job.plan.steps:,} steps of {job.plan.batch_size:,} rows at about "
        f"{job.plan.batch_size / seconds:,.0f} rows/s: {duration(seconds * job.plan.steps)}; "
        f"d_in {job.d_in}, {DEAD_SHARE:.0%} of the features taken to be dead\n"
        f"    constants: {origins}\n"
        f"    use it: torchrun --nproc-per-node {min(machine.ranks, chosen.mesh.ranks)} ... "
        f"train.mesh.data={chosen.mesh.data} train.mesh.feature={chosen.mesh.feature}"
    )


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=None, padding=(0, 2), title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3f}"
