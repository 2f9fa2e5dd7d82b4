"""Where the numbers go: a file always, Weights & Biases where asked, which can neither change nor stop a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .plan import WandbConfig

log = logging.getLogger(__name__)


@runtime_checkable
class Logger(Protocol):
    """Takes the numbers of a step."""

    def write(self, record: Mapping[str, int | float]) -> None:
        """Take one record; it has a `step`."""

    def close(self) -> None:
        """Finish."""


class MetricsFile:
    """Lines of JSON, in the order of steps.

    Parameters
    ----------
    path
        The file; what it holds up to `step` is kept, so that a resumed run leaves no line twice.
    step
        Steps already done.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: Mapping[str, int | float]) -> None:
        """Append one line."""
        self._file.write(json.dumps(dict(record)) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbLogger:
    """Weights & Biases, at arm's length: its first error is reported and it is left alone from then on.

    Parameters
    ----------
    config
        Project and mode.
    folder
        Where it keeps its files.
    settings
        Values shown beside the run.
    """

    def __init__(self, config: WandbConfig, folder: Path, settings: Mapping[str, Any]) -> None:
        self._run: Any = None
        try:
            import wandb

            folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=config.project,
                mode=config.mode,
                dir=str(folder),
                config=dict(settings),
                # the dictionaries of a sweep are runs of their own
                reinit="create_new",
            )
        except Exception as error:  # whatever it raises, training goes on
            self._give_up(error)

    def write(self, record: Mapping[str, int | float]) -> None:
        """Send one record."""
        if self._run is None:
            return
        try:
            values = {name: value for name, value in record.items() if name != "step"}
            self._run.log(values, step=int(record["step"]))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the run."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("wandb failed and is not used any more: %s: %s", type(error).__name__, error)
        self._run = None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
