"""SIGINT and SIGTERM as a KeyboardInterrupt, raised where nothing swallows or breaks by it."""

from __future__ import annotations

import os
import threading
import time
from types import FrameType

_ECHO_SECONDS = 3.0
_AGAIN_SECONDS = 0.05
_HELD_SECONDS = 10.0


class Interruption:
    """A handler that raises KeyboardInterrupt with the signal's number.

    A signal soon after another is left out: torchrun sends its own after the terminal's, and it must not break
    the saving that the first one began.

    During an import or a `__del__` the signal is sent again a moment later, for at most ten seconds: a module left
    half imported fails in ways that name no interruption (a RuntimeError of `__set_name__`, endless recursion in
    numpy's lazy modules), and Python prints and drops what `__del__` raises.
    """

    def __init__(self) -> None:
        self._raised = float("-inf")
        self._held: float | None = None
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise, or have the signal sent again where raising would break what runs."""
        now = time.monotonic()
        if self._held is None:
            self._held = now
        if _would_break(frame) and now - self._held < _HELD_SECONDS:
            again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        self._held = None
        before, self._raised = self._raised, now
        self.number = number
        if now - before > _ECHO_SECONDS:
            raise KeyboardInterrupt(number)


def _would_break(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
