"""SIGINT and SIGTERM as a question to ask between steps, answered by all ranks alike."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from sae.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ECHO = 3.0
"""Seconds after the first signal in which others mean the same."""


class Interrupt:
    """Notes the first SIGINT or SIGTERM while open; a later one acts as if this were not there.

    Launchers pass on what the terminal or the scheduler sent to every process already, so what comes within
    three seconds of the first is the same request.

    Outside the main thread, where Python sets no handlers, it never notes anything. What was noted and led to no
    exception acts at the end.

    Attributes
    ----------
    signal : int or None
        The signal that came.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self.signal is not None:
            # it came after the last time that anybody asked
            signal.raise_signal(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            self._restore()
            signal.raise_signal(number)

    def agreed(self, world: World) -> int | None:
        """Return the signal that any rank has noted, the same on all; every rank asks after the same steps."""
        noted = torch.tensor(self.signal or 0, device=world.device)
        return int(world.all_reduce(noted, "max")) or None

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
