"""From a store to a saved dictionary: what the train stage does."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sae.architectures  # noqa: F401 - registers the kinds
from activations_cache.loader import ShuffledLoader
from activations_cache.moments import Moments
from activations_cache.store import ActivationStore
from sae.base import SAE, SAEConfig
from sae.checkpoint import save_sae
from sae.errors import ConfigError, StoreError
from sae.folding import fold_
from sae.kernels import find_precision
from sae.world import World

from .allocation import kept_memory
from .imported import ImportConfig
from .inputs import Inputs
from .loggers import Logger
from .parallel import gather_whole
from .plan import Plan, TrainConfig, make_plan
from .progress import Progress, silent
from .result import TrainResult
from .side_by_side import SideBySide
from .trainer import METRICS, Trainer, train_together

SPLIT = "fit"


@dataclass(frozen=True)
class Run:
    """One dictionary to be trained.

    Attributes
    ----------
    sae, config, seed
        The dictionary, its training, and the seed of its initial directions.
    out, work, watcher
        As in `train_sae`; no two runs share a folder.
    """

    sae: SAEConfig
    config: TrainConfig
    seed: int
    out: Path
    work: Path
    watcher: Logger | None = None


def train_sae(  # noqa: PLR0913 - the seam between the stages and this room
    store_path: Path,
    sae_config: SAEConfig,
    config: TrainConfig,
    out: Path,
    *,
    hook: str,
    work: Path,
    seed: int,
    world: World,
    progress: Progress = silent,
    watcher: Logger | None = None,
) -> TrainResult:
    """Train a dictionary on the `fit` rows of a store and save it, folded, so that it reads raw activations.

    Every rank calls it with the same arguments; the main one writes what is written once.

    Parameters
    ----------
    store_path
        A complete activation store.
    sae_config, config
        The dictionary and its training.
    out
        Folder that gets `config.json`, `weights.safetensors` and `metrics.jsonl`.
    hook
        One of the store's hooks; see `choose_hook`.
    work
        Folder, seen by all ranks, that keeps `checkpoints/` and metrics over interruptions; a run that finds
        its own there continues it: with the same bits on the same mesh, with the same batches on another.
    seed
        Of the initial directions and of the order of rows.
    world
        Who computes.
    progress
        Called on the main rank with (steps done, steps, text).
    watcher
        Gets every record of metrics besides the files, on the main rank.

    Raises
    ------
    StoreError
        The store is damaged or lacks the hook or the split, or its rows do not vary.
    CheckpointError
        A checkpoint in `work` is damaged or belongs to another run.
    ConfigError
        The configuration cannot be planned, or does not fit the mesh.
    TrainingError
        The loss is not finite.
    KeyboardInterrupt
        SIGINT or SIGTERM came to any rank, its number in `args`; a checkpoint was written.
    """
    run = Run(sae_config, config, seed, out=out, work=work, watcher=watcher)
    (result,) = train_saes(store_path, [run], hook=hook, row_seed=seed, world=world, progress=progress)
    return result


def train_saes(
    store_path: Path,
    runs: Sequence[Run],
    *,
    hook: str,
    row_seed: int,
    world: World,
    progress: Progress = silent,
) -> list[TrainResult]:
    """Train several dictionaries from one read of a store; each as `train_sae` does.

    Parameters
    ----------
    store_path, hook, world, progress
        As in `train_sae`.
    runs
        Of one batch size and number of rows.
    row_seed
        Of the order of rows, the same for all. A run has the bits that it has alone with this order.

    Raises
    ------
    StoreError, CheckpointError, TrainingError, KeyboardInterrupt
        As in `train_sae`.
    ConfigError
        As there, or the runs do not read the same batches.
    """
    store = ActivationStore.open(store_path)
    moments = varying_moments(store, hook)
    plans = [make_plan(run.config, run.sae) for run in runs]
    saes = [_build(run, store.hooks[hook], world) for run in runs]
    _check_same_batches(plans, saes, store.description.run_length)
    mean = torch.from_numpy(moments.mean).float()
    shared = {"hook": hook, "store": store.digest(), "scale": moments.scale, "row_seed": row_seed}
    run_length = store.description.run_length if saes[0].reads_previous else 1
    loader = ShuffledLoader(
        store,
        hook,
        SPLIT,
        batch_size=plans[0].batch_size,
        seed=row_seed,
        world=world,
        run_length=run_length,
        settings=runs[0].config.loader,
    )
    try:
        inputs = Inputs(loader, mean.to(world.device), moments.scale, world)
        trainers = [
            _trainer(run, sae, plan, inputs, shared) for run, sae, plan in zip(runs, saes, plans, strict=True)
        ]
        on_cpu = sum(p.nbytes for sae in saes for p in sae.parameters() if p.device.type == "cpu")
        with kept_memory(on_cpu), SideBySide(len(trainers), world) as members:
            results = train_together(trainers, members, progress if world.is_main else silent)
            _settle(saes, inputs, plans[0].settle_batches, members, world)
    finally:
        loader.close()
    for run, trainer in zip(runs, trainers, strict=True):
        _save(run, trainer, inputs, shared)
    return results


def varying_moments(store: ActivationStore, hook: str) -> Moments:
    """Return the moments of the rows to train on.

    Raises
    ------
    StoreError
        The store lacks the hook or the split, or its rows do not vary.
    """
    moments = store.moments(hook, SPLIT)
    if not 0 < moments.scale < float("inf"):
        raise StoreError(f"the rows of {hook} in split {SPLIT} do not vary", got=f"scale {moments.scale}")
    return moments


def _trainer(run: Run, sae: SAE, plan: Plan, inputs: Inputs, shared: Mapping[str, Any]) -> Trainer:
    return Trainer(
        sae,
        inputs,
        plan,
        run.config,
        work=run.work,
        provenance={**shared, "seed": run.seed},
        world=inputs.world,
        watcher=run.watcher,
    )


def _save(run: Run, trainer: Trainer, inputs: Inputs, shared: Mapping[str, Any]) -> None:
    """Let the main rank write the whole dictionary, folded, and the metrics beside it; a collective."""
    whole = gather_whole(trainer.sae, trainer.world)
    if whole is None:
        return
    extra = {"seed": run.seed, "precision": trainer.sae.precision, "plan": asdict(trainer.plan)}
    save_sae(fold_(whole, inputs.mean, inputs.scale), run.out, extra={**shared, **extra})
    shutil.copyfile(run.work / METRICS, run.out / METRICS)


def _build(run: Run, d_in: int, world: World) -> SAE:
    sae = run.sae.build(d_in, generator=torch.Generator().manual_seed(run.seed), world=world)
    sae.to(world.device)
    sae.precision = find_precision(run.config.precision, world.device)
    return sae


def _check_same_batches(plans: Sequence[Plan], saes: Sequence[SAE], run_length: int) -> None:
    sizes = {(plan.rows, plan.batch_size) for plan in plans}
    orders = {sae.reads_previous for sae in saes} if run_length > 1 else {False}
    if len(sizes) > 1:
        raise ConfigError(
            "dictionaries that are trained together read the same batches",
            got="; ".join(f"{rows} rows in batches of {batch}" for rows, batch in sorted(sizes)),
            do="give all of them the same train.rows and train.batch_size",
        )
    if len(orders) > 1:
        kinds = sorted({sae.config.kind for sae in saes if sae.reads_previous})
        raise ConfigError(
            "dictionaries that are trained together read the same batches",
            got=f"{', '.join(kinds)} keep rows of an entity together, the others shuffle all",
            do="train these kinds in a run of their own",
        )


def _settle(saes: Sequence[SAE], inputs: Inputs, count: int, members: SideBySide, world: World) -> None:
    """Let each dictionary fix what inference uses, on the batches that follow the last step."""
    batches: Iterable[Tensor] = (inputs.next().x for _ in range(count))
    if len(saes) > 1:
        # going back to read them again would read the whole window again
        batches = list(batches)
    members.each(lambda sae: sae.settle(batches, world=world), saes)


def choose_hook(config: TrainConfig | ImportConfig, hooks: Mapping[str, int]) -> str:
    """Return the hook that a dictionary reads: the one named, or the only one.

    Raises
    ------
    ConfigError
        The store lacks the named hook, or none is named and it has several.
    """
    if config.hook in hooks:
        return str(config.hook)
    if config.hook is None and len(hooks) == 1:
        return next(iter(hooks))
    section = "train" if isinstance(config, TrainConfig) else "dictionary"
    got = f"no {section}.hook" if config.hook is None else f"{section}.hook={config.hook}"
    raise ConfigError(
        "which hook the dictionary reads is not clear", got=got, expected=" or ".join(sorted(hooks))
    )
