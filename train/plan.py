"""What a training run is asked to do, and what `auto` means for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from activations_cache.loader import LoaderConfig
from sae.base import SAEConfig
from sae.config import Config
from sae.errors import ConfigError
from sae.world import TIMEOUT, World

Auto = Literal["auto"]

ACTIVATIONS_PER_FEATURE = 25_000
"""Rows are chosen so that a feature of average rate fires this often."""

LEAST_STEPS = 8192
"""Batches grow with the rows only where at least so many steps remain."""

SILENT_CHANCES = 100
"""A feature is dead once it could have fired this often at the average rate and did not."""

DEAD_SHARE = 0.1
"""Share of features taken to be dead before anything is known, so that AuxK works: above it training raises an alarm."""

SETTLE_ROWS = 32_768
"""Rows after the last step from which a dictionary fixes what inference uses, such as a threshold: from as many, L0 comes
within about 0.5% of what 262,144 give, whatever the batch (docs/benchmarks.md)."""


_WITHOUT_EFFECT = {"mesh", "checkpoint_every", "log_every", "wandb"}


class WandbConfig(Config):
    """Where Weights & Biases gets the metrics; they are written to metrics.jsonl in any case."""

    project: str
    """Project that the run belongs to."""
    mode: Literal["offline", "online"] = "offline"
    """offline writes files to upload later and needs no network."""


class MeshConfig(Config):
    """How the processes that torchrun starts share one training; it does not change what is learned."""

    data: int = Field(default=-1, ge=-1)
    """Processes that see different rows; -1 = as many as there are, divided by `feature`."""
    feature: int = Field(default=1, gt=0)
    """Processes over which the features are spread; it divides d_sae. 2 or more where one GPU holds too little."""
    timeout: float = Field(default=TIMEOUT, gt=0)
    """Seconds that a process waits for the others before it fails, naming the call that is stuck."""

    def world(self, device: str) -> World:
        """Return the processes laid out on the mesh.

        Raises
        ------
        ConfigError
            The number of processes is not data * feature, or the device is absent.
        """
        world = World.from_env(device, feature=self.feature, timeout=self.timeout)
        if self.data not in (-1, world.axes["data"]) or self.feature != world.axes["feature"]:
            raise ConfigError(
                "the processes do not fill the mesh",
                got=f"{world.size} processes, train.mesh.data={self.data}, train.mesh.feature={self.feature}",
                do="start data * feature processes with torchrun, or leave train.mesh.data at -1",
            )
        return world


class TrainConfig(Config):
    """How a dictionary is trained; `auto` values follow from d_in, d_sae and k."""

    hook: str | None = None
    """Which hook of the store to train on; needed only where several were harvested."""
    rows: int | Auto = Field("auto")
    """Rows to train on, repeating the split as often as it takes; auto = 25,000 d_sae / k, at least 0.5M."""
    batch_size: Annotated[int, Field(le=2**24)] | Auto = Field("auto")
    """Rows of a step over all processes, at most 16,777,216; auto = 256, doubled up to 4096 while 8192 steps remain."""
    lr: float | Auto = Field("auto")
    """Peak learning rate of Adam; auto falls with the root of d_sae and rises with that of the batch."""
    warmup: float = Field(0.02, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient of all parameters; absent = not limited, for Adam's steps are already."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What finds codes (their values are fp32) and, in one process, what AuxK computes in; auto = bf16 if native."""
    dead_after_rows: int | Auto = Field("auto")
    """Silent rows after which a feature is dead; auto = 100 d_sae / k, at most a tenth of the rows."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between checkpoints; an interrupted run continues from its last one."""
    log_every: int = Field(50, gt=0)
    """Steps between lines of metrics.jsonl."""
    loader: LoaderConfig = LoaderConfig()
    """How rows are read: memory, threads, and whether long histories may dominate."""
    mesh: MeshConfig = MeshConfig()
    """How processes share the work; one process needs none of it."""
    wandb: WandbConfig | None = None
    """Weights & Biases; absent = not used."""

    def what_is_learned(self) -> dict[str, Any]:
        """Return the settings that the weights depend on: all but who computes, and what is written down."""
        settings = {name: value for name, value in self.to_dict().items() if name not in _WITHOUT_EFFECT}
        return {**settings, "loader": {k: v for k, v in settings["loader"].items() if k != "threads"}}


@dataclass(frozen=True)
class Plan:
    """A training run with every number resolved.

    Attributes
    ----------
    rows, batch_size, steps
        steps · batch_size is the first multiple of batch_size not below rows.
    lr
        Peak learning rate.
    warmup_steps, decay_steps
        Length of the two ramps.
    dead_after_rows
        Silent rows after which a feature is dead.
    clip_norm
        Largest norm of the gradient, or None.
    """

    rows: int
    batch_size: int
    steps: int
    lr: float
    warmup_steps: int
    decay_steps: int
    dead_after_rows: int
    clip_norm: float | None = None

    @property
    def settle_batches(self) -> int:
        """Return how many batches hold `SETTLE_ROWS`, or the rows of a run that is shorter than that."""
        return min(self.steps, math.ceil(SETTLE_ROWS / self.batch_size))


def make_plan(config: TrainConfig, sae: SAEConfig) -> Plan:
    """Resolve every `auto`.

    With r = d_sae / k, the rows between two activations of an average feature: rows = 25,000 r, at least
    500,000; batch_size = the largest power of two from 256 to 4096 that leaves 8192 steps; lr = 3e-3 ·
    sqrt(768 / d_sae) · sqrt(batch_size / 256), at most 3e-3; dead_after_rows = 100 r, at most rows / 10.

    Raises
    ------
    ConfigError
        The kind is read only, k exceeds d_sae, or a number is not positive; all such problems at once.
    """
    given = {"train.rows": config.rows, "train.batch_size": config.batch_size, "train.lr": config.lr}
    given["train.dead_after_rows"] = config.dead_after_rows
    problems = [
        f"{key} = {value} is not positive" for key, value in given.items() if value != "auto" and value <= 0
    ]
    if not sae.trainable:
        problems.append(f"{sae.kind} dictionaries are not trained here, only read: choose another sae.kind")
    if sae.k > sae.d_sae:
        problems.append(f"sae.k = {sae.k} exceeds sae.d_sae = {sae.d_sae}")
    if config.warmup + config.decay > 1:
        problems.append(f"train.warmup + train.decay = {config.warmup + config.decay:g} exceeds 1")
    if problems:
        raise ConfigError("this training cannot be planned", got="; ".join(problems))
    gap = sae.d_sae / sae.k
    rows = max(500_000, math.ceil(ACTIVATIONS_PER_FEATURE * gap)) if config.rows == "auto" else config.rows
    batch = _batch_size(rows) if config.batch_size == "auto" else config.batch_size
    steps = math.ceil(rows / batch)
    lr = min(3e-3, 3e-3 * math.sqrt(768 / sae.d_sae * batch / 256)) if config.lr == "auto" else config.lr
    silent = min(math.ceil(SILENT_CHANCES * gap), max(1, rows // 10))
    return Plan(
        rows=rows,
        batch_size=batch,
        steps=steps,
        lr=lr,
        warmup_steps=round(config.warmup * steps),
        decay_steps=round(config.decay * steps),
        dead_after_rows=silent if config.dead_after_rows == "auto" else config.dead_after_rows,
        clip_norm=config.clip_norm,
    )


def _batch_size(rows: int) -> int:
    return 1 << min(12, max(8, int(math.log2(max(1, rows / LEAST_STEPS)))))
