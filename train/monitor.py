"""The numbers of a step over all ranks, how fast it goes, and alarms with advice."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE, Losses
from sae.world import World

from .inputs import LoadsBatches
from .loggers import Logger
from .plan import Plan
from .result import advise
from .schedule import learning_rate
from .state import TrainState

log = logging.getLogger(__name__)

Record = dict[str, int | float]

PATIENCE = 0.05
"""Share of the steps before which no alarm is raised: features start dead, and caches cold."""

ROWS_PER_PRODUCT = 512
"""Rows of the product that the floor is measured by."""


class Monitor:
    """Turns steps into records, hands them to loggers, and warns once of each thing that goes wrong.

    All ranks make records together, after the same steps; what it does changes no run.

    Parameters
    ----------
    loggers
        Who gets the records; of the main rank only.
    plan
        Numbers of the run.
    loader
        Knows how long was waited for data.
    world
        Who computes.
    floor
        Seconds of a step's encoder product alone; see `floor_seconds`.
    rows
        Rows that the run has learned from before.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        plan: Plan,
        loader: LoadsBatches,
        *,
        world: World,
        floor: float,
        rows: int = 0,
    ) -> None:
        self._loggers, self._plan, self._loader = loggers, plan, loader
        self._world, self._floor = world, floor
        self._began = self._last = time.perf_counter()
        self._waited_before = self._waited_last = loader.wait_seconds
        self._rows_last = rows
        self._warned: set[str] = set()
        self._stepped = 0.0
        self.metrics: Record = {}

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return max(time.perf_counter() - self._began, 1e-9)

    @property
    def waited(self) -> float:
        """Share of them that this rank waited for data."""
        return (self._loader.wait_seconds - self._waited_before) / self.seconds

    def stepped(self, seconds: float) -> None:
        """Count the time of a step, waiting for data and the steps of other dictionaries left out."""
        self._stepped += seconds

    def record(self, x: Float[Tensor, "batch d_in"], losses: Losses, state: TrainState) -> Record:
        """Return the numbers of the step that has just ended, after writing them; a collective."""
        now, waited = time.perf_counter(), self._loader.wait_seconds
        elapsed = max(now - self._last, 1e-9)
        learned = state.rows - self._rows_last
        steps = max(1, learned // self._plan.batch_size)
        share = self._over_ranks((waited - self._waited_last) / elapsed)
        self.metrics = {
            "step": state.step,
            "rows": state.rows,
            **self._sums(x, losses),
            "dead": dead_share(state, self._plan, self._world),
            "lr": learning_rate(state.step - 1, self._plan),
            "seconds": now - self._began,
            "rows_per_second": learned / elapsed,
            "floor_share": self._floor * steps / elapsed,
            "wait_share": share,
            "step_seconds": self._stepped,
            "memory_bytes": int(self._over_ranks(memory_bytes(self._world.device))),
            "seconds_left": (self._plan.steps - state.step) * elapsed / steps,
        }
        self._last, self._waited_last, self._rows_last = now, waited, state.rows
        self._stepped = 0.0
        for logger in self._loggers:
            logger.write(self.metrics)
        if state.step >= PATIENCE * self._plan.steps:
            self._warn(len(state.silent_rows) * self._world.axes["feature"])
        return self.metrics

    def close(self) -> None:
        """Finish the loggers."""
        for logger in self._loggers:
            logger.close()

    def _sums(self, x: Tensor, losses: Losses) -> Record:
        """Return the losses, FVU about the data-set mean (that of scaled rows is 0) and L0 of the global batch."""
        x, x_hat = x.detach().double(), losses.x_hat.detach().double()
        sums = {"loss": losses.total, **losses.parts}
        sums |= {"residual": (x - x_hat).square().sum(), "total": x.square().sum()}
        sums["batch"] = torch.tensor(float(len(x)))
        message = torch.stack([value.detach().double().to(x.device) for value in sums.values()])
        found = dict(zip(sums, self._world.all_reduce(message, axis="data").tolist(), strict=True))
        codes = self._world.all_reduce(torch.tensor(len(losses.codes.values), device=x.device))
        fvu = found.pop("residual") / max(found.pop("total"), sys.float_info.min)
        return {"l0": int(codes) / found.pop("batch"), "fvu": fvu, **found}

    def _over_ranks(self, value: float) -> float:
        own = torch.tensor(value, dtype=torch.float64, device=self._world.device)
        return float(self._world.all_reduce(own, "max"))

    def _warn(self, d_sae: int) -> None:
        dead, waited = float(self.metrics["dead"]), float(self.metrics["wait_share"])
        for advice in advise(dead, waited, self._plan, d_sae=d_sae):
            kind = advice.split(" ", 1)[1][:20]
            if self._loggers and kind not in self._warned:
                self._warned.add(kind)
                log.warning("step %s: %s", f"{self.metrics['step']:,}", advice)


def dead_share(state: TrainState, plan: Plan, world: World) -> float:
    """Return the share of dead features over all shards; a collective."""
    dead = state.dead(plan.dead_after_rows).double().mean()
    return float(world.stack(dead, axis="feature").mean())


def floor_seconds(sae: SAE, x: Float[Tensor, "batch d_in"]) -> float:
    """Return the seconds of x W_encᵀ, in row chunks, the better of two: what no exact step can do without."""
    W = sae.W_enc.detach()
    buffer = x.new_empty(min(ROWS_PER_PRODUCT, len(x)), len(W))
    times = []
    for _ in range(2):
        _settle(x.device)
        started = time.perf_counter()
        for start in range(0, len(x), ROWS_PER_PRODUCT):
            chunk = x[start : start + ROWS_PER_PRODUCT]
            torch.mm(chunk, W.T, out=buffer[: len(chunk)])
        _settle(x.device)
        times.append(time.perf_counter() - started)
    return min(times)


def memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def line(metrics: Mapping[str, int | float]) -> str:
    """Return the record as a line of text."""
    return f"loss {metrics['loss']:.4f}  L0 {metrics['l0']:.1f}  dead {metrics['dead']:.1%}"


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
