"""The one loop that trains dictionaries."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import sae.architectures  # noqa: F401 - registers the kinds
from activations_cache.loader import ShuffledLoader
from activations_cache.store import ActivationStore
from sae.base import SAE, Batch, Losses, SAEConfig
from sae.checkpoint import save_sae
from sae.errors import ConfigError, StoreError, UserError
from sae.folding import fold
from sae.world import World

from .checkpoint import checkpoints, load_checkpoint, save_checkpoint
from .inputs import Inputs, LoadsBatches
from .interrupt import Interrupt
from .loggers import Logger, MetricsFile, WandbLogger
from .optim import make_adam
from .plan import Plan, TrainConfig, make_plan
from .progress import Progress, silent
from .result import TrainResult, advise
from .schedule import learning_rate
from .state import TrainState
from .step import NotFiniteError, train_step

__all__ = [
    "Inputs",
    "LoadsBatches",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "choose_hook",
    "train_sae",
]

SPLIT = "fit"
METRICS = "metrics.jsonl"
SETTLE_BATCHES = 64
"""Batches after the last step from which a dictionary fixes what inference uses, such as a threshold."""
SAMPLE_ROWS = 4096
"""Rows looked at before the first step, to place b_dec and to time a step."""


class TrainingError(UserError):
    """Training went wrong in a way that the user can act on."""


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
) -> TrainResult:
    """Train a dictionary on the `fit` rows of a store and save it, folded, so that it reads raw activations.

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
        Folder that keeps `checkpoints/` and metrics over interruptions; a run that finds its own there
        continues it with the same bits.
    seed
        Of the initial directions and of the order of rows.
    world
        Who computes.
    progress
        Called with (steps done, steps, text).

    Raises
    ------
    StoreError
        The store is damaged or lacks the hook or the split, or its rows do not vary.
    CheckpointError
        A checkpoint in `work` is damaged or belongs to another run.
    ConfigError
        The configuration cannot be planned.
    TrainingError
        The loss is not finite.
    KeyboardInterrupt
        SIGINT or SIGTERM came, its number in `args`; a checkpoint was written.
    """
    plan = make_plan(config, sae_config)
    store = ActivationStore.open(store_path)
    moments = store.moments(hook, SPLIT)
    if not 0 < moments.scale < float("inf"):
        raise StoreError(f"the rows of {hook} in split {SPLIT} do not vary", got=f"scale {moments.scale}")
    sae = sae_config.build(store.hooks[hook], generator=torch.Generator().manual_seed(seed)).to(world.device)
    mean = torch.from_numpy(moments.mean).float().to(world.device)
    provenance = {"hook": hook, "seed": seed, "store": store.digest(), "scale": moments.scale}
    loader = ShuffledLoader(store, hook, SPLIT, batch_size=plan.batch_size, seed=seed, world=world)
    try:
        inputs = Inputs(loader, mean, moments.scale)
        trainer = Trainer(sae, inputs, plan, config, work=work, provenance=provenance, world=world)
        result = trainer.fit(progress)
        sae.settle((inputs.next() for _ in range(SETTLE_BATCHES)), world=world)
    finally:
        loader.close()
    if world.is_main:
        save_sae(fold(sae, mean, moments.scale), out, extra={**provenance, "plan": asdict(plan)})
        shutil.copyfile(work / METRICS, out / METRICS)
    return result


def choose_hook(config: TrainConfig, hooks: Mapping[str, int]) -> str:
    """Return the hook to train on: the one named, or the only one.

    Raises
    ------
    ConfigError
        The store lacks the named hook, or none is named and it has several.
    """
    if config.hook in hooks:
        return str(config.hook)
    if config.hook is None and len(hooks) == 1:
        return next(iter(hooks))
    got = "no train.hook" if config.hook is None else f"train.hook={config.hook}"
    raise ConfigError("which hook to train on is not clear", got=got, expected=" or ".join(sorted(hooks)))


class Trainer:
    """One run: what it trains, from what, how far it is.

    Parameters
    ----------
    sae
        Freshly built; trained in place.
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
    ) -> None:
        self.sae, self.inputs, self.plan, self.config, self.world = sae, inputs, plan, config, world
        self.work, self.checkpoints = work, work / "checkpoints"
        self.identity = {"plan": asdict(plan), "sae": sae.config.to_dict(), "d_in": sae.d_in, **provenance}
        self.optimiser = make_adam(sae)
        self.state = TrainState.start(sae.d_sae, world.device)

    def fit(self, progress: Progress = silent) -> TrainResult:
        """Train to the end, from the last checkpoint where there is one."""
        self._start_or_resume(progress)
        loggers = self._open_loggers()
        started, waited = time.perf_counter(), self.inputs.loader.wait_seconds
        metrics: dict[str, int | float] = {}
        try:
            with Interrupt() as interrupt:
                while self.state.step < self.plan.steps:
                    losses = self._step()
                    last = self.state.step == self.plan.steps
                    if last or self.state.step % self.config.log_every == 0:
                        metrics = self._describe(losses, time.perf_counter() - started)
                        for logger in loggers:
                            logger.write(metrics)
                        progress(self.state.step, self.plan.steps, _line(metrics))
                    if last or interrupt.signal or self.state.step % self.config.checkpoint_every == 0:
                        self.save()
                    if interrupt.signal and not last:
                        raise KeyboardInterrupt(interrupt.signal)
        finally:
            for logger in loggers:
                logger.close()
        seconds = max(time.perf_counter() - started, 1e-9)
        share = (self.inputs.loader.wait_seconds - waited) / seconds
        dead = float(self.state.dead(self.plan.dead_after_rows).double().mean())
        advice = advise(dead, share, self.plan)
        return TrainResult(self.plan, seconds, share, dead, metrics, advice)

    def save(self) -> None:
        """Write a checkpoint."""
        if self.world.is_main:
            position = self.inputs.loader.state_dict()
            save_checkpoint(
                self.checkpoints,
                self.sae,
                self.optimiser,
                self.state,
                loader=position,
                identity=self.identity,
            )

    def _start_or_resume(self, progress: Progress) -> None:
        found = checkpoints(self.checkpoints)
        if found:
            self.state, position = load_checkpoint(
                found[-1], self.sae, self.optimiser, identity=self.identity
            )
            self.inputs.loader.load_state_dict(position)
        if self.state.step >= self.plan.steps:
            return
        sample = self.inputs.peek(SAMPLE_ROWS)
        if not found:
            self.sae.start_at(sample)
        seconds = self._probe(sample[: self.plan.batch_size]) * (self.plan.steps - self.state.step)
        place = f", continuing at step {self.state.step:,}" if found else ""
        text = f"{self.plan.rows:,} rows in {self.plan.steps:,} steps{place}; about {_duration(seconds)}"
        progress(0, self.plan.steps, text)

    def _probe(self, x: Float[Tensor, "batch d_in"]) -> float:
        """Return the seconds of a step without its update, the better of two; changes nothing."""
        times = []
        for _ in range(2):
            started = time.perf_counter()
            dead = self.state.dead(self.plan.dead_after_rows)
            torch.autograd.backward(self.sae.losses(Batch(x), dead=dead, world=self.world).total)
            times.append(time.perf_counter() - started)
            self.optimiser.zero_grad()
        return min(times)

    def _step(self) -> Losses:
        position = self.inputs.loader.state_dict()
        x = self.inputs.next()
        try:
            return train_step(self.sae, self.optimiser, self.state, x, plan=self.plan, world=self.world)
        except NotFiniteError as error:
            self.inputs.loader.load_state_dict(position)
            self.save()
            bad = (~torch.isfinite(x)).any(1).nonzero().squeeze(1)
            rows = (
                f"rows {bad[:5].tolist()} of it are not finite"
                if len(bad)
                else f"largest input {x.abs().max():g}"
            )
            raise TrainingError(
                f"the loss of step {self.state.step} is not finite",
                got=f"{error}; batch {self.state.step} of the loader: {rows}",
                do="check the activations, or lower train.lr; a checkpoint holds the state before this step",
            ) from error

    def _open_loggers(self) -> list[Logger]:
        if not self.world.is_main:
            return []
        loggers: list[Logger] = [MetricsFile(self.work / METRICS, step=self.state.step)]
        if self.config.wandb is not None:
            loggers.append(WandbLogger(self.config.wandb, self.work / "wandb", self.identity))
        return loggers

    def _describe(self, losses: Losses, seconds: float) -> dict[str, int | float]:
        parts = {name: float(value) for name, value in losses.parts.items()}
        return {
            "step": self.state.step,
            "rows": self.state.rows,
            "loss": float(losses.total.detach()),
            **parts,
            "l0": len(losses.codes.values) / losses.codes.rows,
            "dead": float(self.state.dead(self.plan.dead_after_rows).double().mean()),
            "lr": learning_rate(self.state.step - 1, self.plan),
            "seconds": seconds,
            "waited": self.inputs.loader.wait_seconds,
        }


def _line(metrics: Mapping[str, int | float]) -> str:
    return f"loss {metrics['loss']:.4f}  L0 {metrics['l0']:.1f}  dead {metrics['dead']:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
