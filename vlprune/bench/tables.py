"""Tables of measured rows: for the terminal while it is measured, and for documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlprune.bench.journal import Row
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from rich.console import Console

Column = tuple[str, Callable[[Row], str]]
"""A heading, and what stands under it for a row."""
NOTHING = "–"
"""Stands for what was not measured."""


def number(name: str, digits: int = 1, factor: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(name)
        return NOTHING if value is None else f"{factor * value:.{digits}f}{unit}"

    return cell


def percent(name: str, digits: int = 1) -> Callable[[Row], str]:
    return number(name, digits, 100, " %")


def between(name: str, digits: int = 2, factor: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    """A median with half of its 95 % interval."""

    def cell(row: Row) -> str:
        value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
        if value is None or low is None or high is None:
            return NOTHING
        return f"{factor * value:.{digits}f}{unit} ± {factor * (high - low) / 2:.{digits}f}"

    return cell


def spread(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        low, middle, high = (row.get(f"{name}_p{share}") for share in (20, 50, 80))
        return NOTHING if middle is None else f"{short(middle)} ({short(low)}–{short(high)})"

    return cell


def short(value: Any) -> str:
    """Three digits, as many as a time is worth."""
    if value is None:
        return NOTHING
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f}"


def method_of(row: Row) -> str:
    return f"{row['method']} again" if row.get("repeat") else str(row["method"])


def budget_of(row: Row) -> str:
    return NOTHING if row["method"] == UNPRUNED else str(row["budget"])


def show(rows: Sequence[Row], columns: Sequence[Column], console: Console, style: Callable[[Row], str | None]) -> None:
    """A table, in full: where the terminal is too narrow it breaks lines, and no number is cut off."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for index, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell(row)) for _, cell in columns), style=style(row))
    needed, width = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum, console.width
    console.width = max(width, needed)
    console.print(table)
    console.width = width


def show_settings(groups: Mapping[str, Sequence[Row]], columns: Sequence[Column], console: Console, legend: str) -> None:
    """A table a group, under its title, with what failed below it: rows of methods at budgets."""
    for title, rows in groups.items():
        console.print(f"\n[bold]{title}[/bold]")
        show([row for row in rows if not row.get("error")], columns, console, lambda row: None)
        show_errors(rows, console, lambda row: f"{row['method']} {row['budget']}")
    console.print(f"[dim]{legend}[/dim]")


def show_errors(rows: Sequence[Row], console: Console, name: Callable[[Row], str]) -> None:
    from rich.markup import escape

    for row in rows:
        if row.get("error"):
            console.print(f"[red]{escape(name(row))}: {escape(str(row['error']))}[/red]")


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [_line([heading for heading, _ in columns]), _line(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [_line([cell(row) for _, cell in columns]) for row in rows if not row.get("error")]
    failed = [
        f"- {row.get('method') or row.get('operation')} {_what(row)}: {row['error']}" for row in rows if row.get("error")
    ]
    return "\n".join(lines + (["", "Not measured:", "", *failed] if failed else []))


def _what(row: Row) -> str:
    return str(row["budget"]) if "method" in row else f"{row['shape']}, {row['variant']}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def provenance(rows: Sequence[Row]) -> str:
    """Hardware, versions, commit, date and command of rows, each of them once."""

    def all_of(name: str) -> str:
        return " and ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))

    sizes = ", ".join(f"{all_of(name)} {name}" for name in ("cores", "threads") if all_of(name))
    cores = f" ({sizes})" if sizes else ""
    packages = ("vlprune", "vllm", "torch", "transformers", "triton")
    versions = ", ".join(f"{name} {all_of(name)}" for name in packages if all_of(name))
    dates = sorted({str(row["date"])[:10] for row in rows})
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(str(row["command"]) for row in rows))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{all_of('device')}{cores}; {versions}, commit {all_of('commit')}; {days}; {commands}."
