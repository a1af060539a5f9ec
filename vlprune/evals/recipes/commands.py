"""What the command line does with recipes: ``vlprune recipe``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlprune.evals import recipes
from vlprune.evals.recipes import Beside, Recipe
from vlprune.terminal import AsJson, clear_errors, print_json


@clear_errors
def recipe(
    name: Annotated[str | None, typer.Argument(help="A recipe; without one, all are listed.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Folder of a run of the recipe, whose numbers are put beside the published ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tells what to run for a main table of the field, and puts measured numbers beside the published ones.

    Example: vlprune recipe llava-1.5-7b
    """
    console = Console(highlight=False)
    if name is None:
        known = [{"name": one.name, "title": one.title} for one in map(recipes.load, recipes.NAMES)]
        print_json(known) if as_json else _print_known(console, known)
        return
    found = recipes.load(name)
    if measured is None:
        print_json({**asdict(found), "command": found.command()}) if as_json else _describe(console, found)
        return
    from vlprune.evals.report import Run

    rows = recipes.beside(found, Run.read(measured).summaries())
    if as_json:
        print_json(list(map(asdict, rows)))
        return
    _print_beside(console, rows)
    _print_notes(console, found)


def _print_known(console: Console, known: Sequence[dict[str, str]]) -> None:
    for one in known:
        console.print(f"{one['name']:<16}{escape(one['title'])}", soft_wrap=True)


def _describe(console: Console, found: Recipe) -> None:
    sources = dict.fromkeys(one.source for one in found.published)
    console.print(f"[bold]{escape(found.title)}[/bold]")
    _print_notes(console, found)
    console.print(f"{len(found.published)} published numbers: {escape('; '.join(sources))}.", soft_wrap=True)
    out = f"results/{found.name}"
    console.print(f"\n{escape(shlex.join([*found.command(), '--out', out]))}", soft_wrap=True)
    console.print(escape(f"vlprune recipe {found.name} --measured {out}"), soft_wrap=True)


def _print_notes(console: Console, found: Recipe) -> None:
    for note in found.notes:
        console.print(f"- {escape(note)}", soft_wrap=True)


def _print_beside(console: Console, rows: Sequence[Beside]) -> None:
    for source in dict.fromkeys(one.published.source for one in rows):
        table = Table("method", "budget", "benchmark", "number", title=escape(source), title_justify="left")
        for column in ("published", "measured", "difference"):
            table.add_column(column, justify="right")
        for one in rows:
            if one.published.source == source:
                table.add_row(*map(escape, _cells(one)))
        console.print(table)


def _cells(one: Beside) -> list[str]:
    published = one.published
    budget = "–" if published.setting.method == "none" else str(published.setting.budget)
    cells = [published.setting.method, budget, published.benchmark, published.number, f"{published.value:.1f}"]
    if one.measured is None or one.margin is None:
        return [*cells, "–", "–"]
    return [*cells, f"{one.measured:.1f} ±{one.margin:.1f}", f"{one.measured - published.value:+.1f}"]
