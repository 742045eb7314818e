"""What rich draws: one progress bar for every long job, silent if standard error is not a terminal; a console for tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported by whoever draws: a worker process starts a tenth faster without it
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task
    from rich.text import Text


def shown(bar: Progress, description: str, total: int, before: int = 0) -> Callable[[int], None]:
    """Add a task to the bar, `before` of which was done earlier; return a function that takes how much more is done."""
    task = bar.add_task(description, total=total, completed=before)
    return lambda count: bar.update(task, completed=before + count)


def progress_bar(*extra: ProgressColumn) -> Progress:
    """Return a rich Progress on standard error, with `extra` columns at its end."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Column with the speed of a task, in units per second."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed or 0.0
            return Text(f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2f}/s")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *extra,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def plain_console() -> Console:
    """Return standard output for tables; if it is piped, it is neither wrapped nor coloured."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=200)
