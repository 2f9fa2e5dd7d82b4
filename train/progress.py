"""A progress bar for whoever watches; training itself only calls a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a line that says how it goes."""


def silent(done: int, total: int, text: str) -> None:
    """Show nothing."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a callback that draws a bar; lines given at step 0 and at the end stay on the screen above it."""
    from rich import progress as rich_progress

    columns = (
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.description}"),
    )
    with rich_progress.Progress(*columns) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, text: str) -> None:
            if done in (0, total) and text:
                bar.console.print(text)
            bar.update(task, completed=done, total=total, description=text.splitlines()[0] if text else "")

        yield show
