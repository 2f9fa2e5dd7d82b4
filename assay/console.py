"""The screen: one line per stage, a bar for long work, messages where the user must act."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import rich.console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from train.progress import EveryMinute, duration


class Bar(Protocol):
    """Shows how far something is."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Show `done` of `total`, with a line of text."""
        ...


class _Screen(rich.console.Console):
    """Rich's console, with which a command goes on in silence once the reader of its output has gone."""

    def on_broken_pipe(self) -> None:
        """Turn to /dev/null, as rich does, and do not exit as it does."""
        with suppress(SystemExit):
            super().on_broken_pipe()


class Console:
    """Writes to the terminal, or plain lines where there is none.

    Parameters
    ----------
    quiet
        Whether to write nothing: of several processes one speaks.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.rich = _Screen(highlight=False, quiet=quiet)
        if not self.rich.is_terminal:
            # files and pipes have no width of their own
            self.rich = _Screen(highlight=False, width=160, quiet=quiet)

    def print(self, *what: object) -> None:
        """Print anything that rich can render, brackets in a text being markup."""
        self.rich.print(*what)

    def say(self, text: str) -> None:
        """Print a text as it is, on one line: names and paths may hold brackets."""
        self.rich.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line below the current stage."""
        self.rich.print(f"    {text}", markup=False)

    def started(self, stage: str, why: str) -> None:
        """Say that a stage begins."""
        self.rich.print(f"[bold]{stage}[/] {escape(why)}".rstrip())

    def skipped(self, stage: str, seconds: float) -> None:
        """Say that a stage's output is fresh."""
        self.rich.print(f"[bold]{stage}[/] [dim]is fresh (took {seconds:.1f} s)[/]")

    def finished(self, stage: str, seconds: float, output: Path) -> None:
        """Say that a stage is done."""
        self.rich.print(
            f"    [green]done[/] in {seconds:.1f} s: [dim]{escape(str(output))}[/]", soft_wrap=True
        )

    @contextmanager
    def bar(self, unit: str) -> Iterator[Bar]:
        """Show a progress bar while the block runs; where there is no terminal, a line every minute."""
        if not self.rich.is_terminal:
            yield _Lines(self, unit)
            return
        columns = (
            TextColumn("    "),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.description}[/]"),
        )
        with Progress(*columns, console=self.rich, transient=True) as progress:
            task = progress.add_task("", total=None)

            def show(done: int, total: int, text: str = "") -> None:
                line = escape(text.splitlines()[0]) if text else ""
                progress.update(task, completed=done, total=total, description=line)

            yield show


class _Lines:
    """Says now and then how far something is, for whoever reads the log of a job."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit, self._lines = console, unit, EveryMinute()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        if self._lines.due():
            so_far = f"{done:,} of {total:,} {self._unit}".rstrip()
            after = duration(time.monotonic() - self._lines.began)
            self._console.note(f"{so_far} after {after}" + (f"; {text.splitlines()[0]}" if text else ""))
