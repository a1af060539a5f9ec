"""How far a run is, and how long it will take: a bar in a terminal, a line every so often elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.markup import escape

PLAIN_INTERVAL = 20.0
"""Seconds between two lines of progress where no terminal shows a bar."""


@contextmanager
def shown(console: Console, total: int) -> Iterator[Callable[[Any], None]]:
    """Gives what is to be called with each :class:`vlprune.evals.runner.Progress`."""
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    columns = (
        bars.TextColumn("{task.description:<14}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda state: bar.update(task, completed=state.done, description=escape(state.setting.label))


class PlainProgress:
    """Prints a line every :data:`PLAIN_INTERVAL` seconds and at the end."""

    def __init__(self, console: Console):
        self.console = console
        self.started = self.said = time.monotonic()

    def __call__(self, state: Any) -> None:
        now = time.monotonic()
        if now - self.said < PLAIN_INTERVAL and state.done < state.total:
            return
        self.said = now
        left = (state.total - state.done) * (now - self.started) / max(1, state.done - state.resumed)
        where = escape(f"{state.task.key}, {state.setting.label}")
        self.console.print(f"{state.done}/{state.total} answers, {where}, about {_minutes(left)} left", highlight=False)


def _minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
