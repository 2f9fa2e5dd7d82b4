"""What whoever watches sees: a callback for progress, and a live table of the latest numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table

SECONDS_BETWEEN_LINES = 60.0

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a line that says how it goes."""


def silent(done: int, total: int, text: str) -> None:
    """Show nothing."""


class EveryMinute:
    """Says when it is time for another line of a log: not before a minute has gone by, nor sooner after the last."""

    def __init__(self) -> None:
        self.began = self._said = time.monotonic()

    def due(self) -> bool:
        """Return whether it is, and if so note that the line is written."""
        now = time.monotonic()
        due = now >= self._said + SECONDS_BETWEEN_LINES
        if due:
            self._said = now
        return due


class LiveTable:
    """A logger that keeps the latest record on the screen as a table; where there is no terminal, a line every minute.

    Parameters
    ----------
    console
        The screen.
    steps
        Steps in all.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._steps = steps
        self._shown = console.is_terminal
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._console, self._lines = console, EveryMinute()

    def write(self, record: Mapping[str, int | float]) -> None:
        """Show a record."""
        if self._shown:
            self._live.start()
            self._live.update(as_table(record, self._steps))
        elif self._lines.due():
            cells = as_cells(record, self._steps)
            said = ", ".join(f"{name} {cell}" for name, cell in cells.items())
            self._console.print(f"    {said}", markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the table off the screen."""
        if self._shown:
            self._live.stop()


def as_cells(record: Mapping[str, int | float], steps: int) -> dict[str, str]:
    """Return a record as short texts by name."""
    return {
        "step": f"{record['step']:,} of {steps:,}",
        "rows/s": f"{record['rows_per_second']:,.0f}",
        "of floor": f"{record['floor_share']:.0%}",
        "waiting": f"{record['wait_share']:.0%}",
        "loss": f"{record['loss']:.4f}",
        "FVU": f"{record['fvu']:.4f}",
        "L0": f"{record['l0']:.1f}",
        "dead": f"{record['dead']:.1%}",
        "rate": f"{record['lr']:.1e}",
        "memory": f"{record['memory_bytes'] / 2**30:.2f} GiB",
        "left": duration(record["seconds_left"]),
    }


def as_table(record: Mapping[str, int | float], steps: int) -> Table:
    """Return a record as a table of one row."""
    cells = as_cells(record, steps)
    table = Table(box=None, padding=(0, 2))
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    return table


def duration(seconds: float) -> str:
    """Return a time as text: '2 h 5 min', '3 min 20 s', '8 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
