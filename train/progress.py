"""What whoever watches sees: a callback for progress, and a live table of the latest numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a line that says how it goes."""


def silent(done: int, total: int, text: str) -> None:
    """Show nothing."""


class LiveTable:
    """A logger that keeps the latest record on the screen as a table; on what is no terminal, nothing.

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

    def write(self, record: Mapping[str, int | float]) -> None:
        """Show a record."""
        if self._shown:
            self._live.start()
            self._live.update(as_table(record, self._steps))

    def close(self) -> None:
        """Take the table off the screen."""
        if self._shown:
            self._live.stop()


def as_table(record: Mapping[str, int | float], steps: int) -> Table:
    """Return a record as a table of one row."""
    cells = {
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
