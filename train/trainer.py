"""The one loop that trains dictionaries."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE, Batch, Losses, SAEConfig
from sae.errors import UserError
from sae.kernels import find_precision
from sae.sizing import suggest_sizes
from sae.world import World

from .allocation import give_back
from .checkpoint import Checkpoints, newest_common
from .groups import Group, make_groups
from .inputs import Inputs
from .interrupt import Interrupt
from .loggers import Logger, MetricsFile, WandbLogger
from .monitor import Monitor, dead_share, floor_seconds, line
from .optim import make_adam
from .plan import Plan, TrainConfig
from .progress import Progress, duration, silent
from .result import TrainResult, advise
from .side_by_side import SideBySide
from .state import TrainState
from .step import NotFiniteError, train_step

METRICS = "metrics.jsonl"
SAMPLE_ROWS = 4096
"""Rows looked at before the first step, to place b_dec."""


class TrainingError(UserError):
    """Training went wrong in a way that the user can act on."""


class Trainer:
    """One run: what it trains, from what, how far it is.

    Every rank has one; what they do together is in step: no rank decides anything by its own data.

    Parameters
    ----------
    sae
        Freshly built, and sharded where the features are spread over ranks; trained in place.
    inputs
        Scaled batches.
    plan, config
        Numbers of the run, and how often it reports.
    work
        Folder for checkpoints and metrics.
    provenance
        JSON values that, with plan and dictionary, make a checkpoint belong to this run.
    world
        Who computes.
    watcher
        Gets every record besides the files.
    """

    def __init__(
        self,
        sae: SAE,
        inputs: Inputs,
        plan: Plan,
        config: TrainConfig,
        *,
        work: Path,
        provenance: Mapping[str, Any],
        world: World,
        watcher: Logger | None = None,
    ) -> None:
        self.sae, self.inputs, self.plan, self.config, self.world = sae, inputs, plan, config, world
        self.work, self.watcher = work, watcher
        self.identity = {"plan": asdict(plan), "sae": sae.config.to_dict(), "d_in": sae.d_in, **provenance}
        self.checkpoints = Checkpoints(work / "checkpoints", identity=self.identity, world=world)
        self.optimiser = make_adam(sae)
        self.state = TrainState.start(sae.d_sae, world.device)

    def fit(self, progress: Progress = silent) -> TrainResult:
        """Train to the end, from the last checkpoint where there is one."""
        with SideBySide(1, self.world) as members:
            (result,) = train_together([self], members, progress)
        return result

    def save(self) -> None:
        """Begin a checkpoint of this moment; it is written while training goes on."""
        position = self.inputs.loader.state_dict()
        self.checkpoints.begin(self.sae, self.optimiser, self.state, loader=position)

    def resume(self, step: int) -> dict[str, Any]:
        """Go to where the run stood after `step` steps; return the loader's position there."""
        self.state, position = self.checkpoints.load(self.sae, self.optimiser, step)
        return position

    def step(self, batch: Batch, position: Mapping[str, Any]) -> Losses:
        """Learn from a batch.

        Parameters
        ----------
        batch
            The same on all trainers that share the inputs.
        position
            Of the loader before it.

        Raises
        ------
        TrainingError
            The loss is not finite; a checkpoint of this dictionary holds the state before the step, until the same command
            is given again: where others learn besides, they may have taken the step.
        """
        try:
            return train_step(self.sae, self.optimiser, self.state, batch, plan=self.plan, world=self.world)
        except NotFiniteError as error:
            raise self.stopped(error, batch, position) from error

    def stopped(self, error: NotFiniteError, batch: Batch, position: Mapping[str, Any]) -> TrainingError:
        """Return what to raise where a batch's loss is not finite, after a checkpoint of the state before it."""
        self.inputs.loader.load_state_dict(position)
        self.save()
        self.checkpoints.finish()
        config = self.sae.config
        return TrainingError(
            f"the loss of step {self.state.step} is not finite",
            got=f"{error}; batch {self.state.step} of the loader: {self._blame(batch.x)}; "
            f"{self.work.name}: {config.kind} of {config.d_sae} features, k {config.k}, "
            f"learning rate {self.plan.lr:g}",
            do="check the activations, or lower train.lr",
        )

    def _blame(self, x: Float[Tensor, "batch d_in"]) -> str:
        """Say which rows of the global batch are not finite, or how large it is."""
        batch = torch.cat(self.world.all_gather(x, axis="data"))
        bad = (~torch.isfinite(batch)).any(1).nonzero().squeeze(1)
        if len(bad):
            return f"rows {bad[:5].tolist()} of it are not finite"
        return f"largest input {batch.abs().max():g}"

    def open_loggers(self) -> list[Logger]:
        """Return who gets the records: nobody on ranks other than the main one."""
        if not self.world.is_main:
            return []
        loggers: list[Logger] = [MetricsFile(self.work / METRICS, step=self.state.step)]
        if self.config.wandb is not None:
            loggers.append(WandbLogger(self.config.wandb, self.work / "wandb", self.identity))
        if self.watcher is not None:
            loggers.append(self.watcher)
        return loggers


def train_together(
    trainers: Sequence[Trainer], members: SideBySide, progress: Progress = silent
) -> list[TrainResult]:
    """Train dictionaries on the same batches to the end, from the last step that all have a checkpoint of.

    They share their inputs, batch size and number of steps, so that every batch is read once. Each gets the bits
    that it gets alone on as many threads as `members` gives it; in a stack (`train.groups`), those to rounding.
    """
    lead = trainers[0]
    about = _start_or_resume(trainers, members, announced=progress is not silent)
    # the first rows, and what was made of them, take more than a step of a small dictionary
    give_back()
    groups = make_groups(trainers, workers=members.workers)
    floors = _announce(groups, members, progress, about)
    monitors = {
        t: Monitor(
            t.open_loggers(), t.plan, lead.inputs.loader, world=lead.world, floor=floor, rows=t.state.rows
        )
        for t, floor in ((t, floors[t]) for t in trainers)
    }
    try:
        with Interrupt() as interrupt:
            while lead.state.step < lead.plan.steps:
                _step(groups, monitors, members, progress)
                last = lead.state.step == lead.plan.steps
                signal = interrupt.agreed(lead.world)
                if last or signal or lead.state.step % lead.config.checkpoint_every == 0:
                    for trainer in trainers:
                        trainer.save()
                if signal:
                    _finish(trainers)
                    raise KeyboardInterrupt(signal)
            _finish(trainers)
            if signal := interrupt.agreed(lead.world):
                raise KeyboardInterrupt(signal)
    except TrainingError:
        _finish(trainers)
        raise
    finally:
        for trainer, monitor in monitors.items():
            monitor.close()
            trainer.checkpoints.close()
    return [_result(trainer, monitor) for trainer, monitor in monitors.items()]


def _step(
    groups: Sequence[Group], monitors: Mapping[Trainer, Monitor], members: SideBySide, progress: Progress
) -> None:
    """Let all learn from the next batch, and write down how it went where it is time to."""
    lead = next(iter(monitors))
    position = lead.inputs.loader.state_dict()
    batch = lead.inputs.next()

    def learn(group: Group) -> tuple[Losses, float]:
        started = time.perf_counter()
        losses = group.step(batch, position)
        return losses, (time.perf_counter() - started) / len(group.trainers)

    for group, (losses, seconds) in zip(groups, members.each(learn, groups), strict=True):
        own: list[Losses] = []
        for number, trainer in enumerate(group.trainers):
            monitors[trainer].stepped(seconds)
            trainer.checkpoints.poll()
            state, plan = trainer.state, trainer.plan
            if state.step == plan.steps or state.step % trainer.config.log_every == 0:
                own = own or group.apart(losses)
                metrics = monitors[trainer].record(batch.x, own[number], state)
                if trainer is lead:
                    progress(state.step, plan.steps, line(metrics))


def _start_or_resume(trainers: Sequence[Trainer], members: SideBySide, *, announced: bool) -> str:
    """Go to where the runs stand; return what can be said of the rows, where somebody hears it."""
    lead = trainers[0]
    found = newest_common([trainer.checkpoints for trainer in trainers])
    if found is not None:
        positions = [trainer.resume(found) for trainer in trainers]
        lead.inputs.loader.load_state_dict(positions[0])
        return ""
    sample = lead.inputs.sample(SAMPLE_ROWS, lead.world)
    # the loader has begun anew, and its windows are free
    give_back()
    members.each(lambda trainer: trainer.sae.start_at(sample), trainers)
    rows = min(SAMPLE_ROWS, lead.inputs.loader.rows_per_epoch)
    return _about(sample[:rows], lead.sae.config) if announced else ""


def _announce(
    groups: Sequence[Group], members: SideBySide, progress: Progress, about: str
) -> dict[Trainer, float]:
    """Say how long the runs will take; return their floors of a step in seconds."""
    trainers = [trainer for group in groups for trainer in group.trainers]
    lead = trainers[0]
    if lead.state.step >= lead.plan.steps:
        return dict.fromkeys(trainers, 0.0)
    batch = lead.inputs.peek()
    together = sum(members.each(lambda group: group.probe(batch), groups)) / members.workers
    seconds = together * (lead.plan.steps - lead.state.step)
    who = f"{len(trainers)} dictionaries, " if len(trainers) > 1 else ""
    place = ""
    if lead.state.step:
        place = f", continuing at step {lead.state.step:,}"
        if lead.sae.precision != find_precision(lead.config.precision, lead.world.device):
            place += f" in {lead.sae.precision}, as it was begun"
    progress(
        0,
        lead.plan.steps,
        f"{who}{lead.plan.rows:,} rows in {lead.plan.steps:,} steps{place}; about {duration(seconds)}{about}",
    )
    return {trainer: floor_seconds(trainer.sae, batch.x) for trainer in trainers}


def _about(sample: Float[Tensor, "rows d_in"], config: SAEConfig) -> str:
    """Say how few dimensions the rows fill, and which numbers they support where those given are far off."""
    if not torch.isfinite(sample).all():
        # never of a store, whose moments refuse such rows; the first step says which rows these are
        return ""
    found = suggest_sizes(sample)
    text = f"; effective rank of the rows {found.effective_rank:.1f} of {sample.shape[1]}"
    if found.supports(config.d_sae, config.k):
        return text
    return (
        f"{text}: they support about sae.d_sae={found.d_sae} and sae.k={found.k}, which `auto` takes, "
        f"not {config.d_sae} and {config.k}"
    )


def _finish(trainers: Sequence[Trainer]) -> None:
    for trainer in trainers:
        trainer.checkpoints.finish()


def _result(trainer: Trainer, monitor: Monitor) -> TrainResult:
    dead, waited = dead_share(trainer.state, trainer.plan, trainer.world), monitor.waited
    advice = advise(dead, waited, trainer.plan, d_sae=trainer.sae.config.d_sae)
    return TrainResult(trainer.plan, monitor.seconds, waited, dead, monitor.metrics, advice)
