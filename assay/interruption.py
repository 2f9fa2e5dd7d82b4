"""SIGINT and SIGTERM as a KeyboardInterrupt, raised where nothing swallows or breaks by it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

_ECHO_SECONDS = 3.0
_AGAIN_SECONDS = 0.05
_HELD_SECONDS = 10.0
_CALLBACKS = "llvmlite/binding/executionengine.py"
"""Where LLVM calls Python, by ctypes: numba's compiled code goes through there, and what is raised is dropped."""


class Interruption:
    """A handler that raises KeyboardInterrupt with the signal's number.

    A signal soon after another is left out: torchrun sends its own after the terminal's, and it must not break
    the saving that the first one began.

    During an import, a `__del__` or a callback of LLVM the signal is sent again a moment later, for at most ten
    seconds: a module left half imported fails in ways that name no interruption (a RuntimeError of `__set_name__`,
    endless recursion in numpy's lazy modules), and Python prints and drops what `__del__` and callbacks raise. Other
    callbacks from C cannot be recognised; where Python drops a KeyboardInterrupt there, `dropped`, which is to be
    `sys.unraisablehook`, sends the signal again.
    """

    def __init__(self) -> None:
        self._raised = float("-inf")
        self._held = self._latest = float("-inf")
        self.number: int | None = None
        self.before = sys.unraisablehook

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise, or have the signal sent again where raising would break what runs."""
        now = time.monotonic()
        if _would_break(frame):
            # what was sent again may have reached another handler
            forgotten = now - self._latest > _ECHO_SECONDS
            self._held, self._latest = now if forgotten else self._held, now
            if now - self._held < _HELD_SECONDS:
                _send_again(number)
                return
        self._latest = float("-inf")
        before, self._raised = self._raised, now
        self.number = number
        if now - before > _ECHO_SECONDS:
            raise KeyboardInterrupt(number)

    def ended(self, number: int, frame: FrameType | None) -> None:
        """End the process at once: the handler of a command that has failed, while threads and pools end.

        Nothing is raised, which what runs at exit would print and drop, and an echo still does not change the code.
        """
        if time.monotonic() - self._raised > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def dropped(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Have the signal sent again where Python had to drop its KeyboardInterrupt."""
        stop = unraisable.exc_value
        if not isinstance(stop, KeyboardInterrupt) or not stop.args:
            self.before(unraisable)
            return
        self._raised = float("-inf")
        _send_again(stop.args[0])


def _send_again(number: int) -> None:
    again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _would_break(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename.startswith("<frozen importlib"):
            return True
        if code.co_filename.endswith(_CALLBACKS):
            return True
        frame = frame.f_back
    return False
