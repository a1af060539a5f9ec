"""One voice for all commands: errors in one line with the way out, tables for people, JSON for scripts."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlprune.errors import VLPruneError

BAD_INPUT, INTERRUPTED = 2, 130
"""Exit codes: what was asked for cannot be done, and Ctrl-C, as shells have it."""
P = ParamSpec("P")

AsJson = Annotated[bool, typer.Option("--json", help="JSON for scripts in place of what is printed for people.")]


def clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that vlprune raises on purpose become one red line and exit code 2; Ctrl-C exits with 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except VLPruneError as error:
            print_error(str(error))
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def print_error(text: str) -> None:
    """One red line on stderr, however many lines ``text`` has."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[red]vlprune: {escape(' '.join(text.split()))}[/red]")


def print_json(data: Any) -> None:
    """``data`` on stdout, and nothing else: no colours, no wrapping."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_table(rows: Iterable[Mapping[str, str]]) -> None:
    """A table with the rows' keys as its headings."""
    rows = list(rows)
    table = Table()
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")  # narrow terminals show everything, too
    for row in rows:
        table.add_row(*map(escape, row.values()))
    Console(highlight=False).print(table)
