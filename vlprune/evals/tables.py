"""Summaries as tables: for the terminal, for documents (markdown), for other programs (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlprune.evals.journal import Row
from vlprune.evals.report import Summary, overview
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Column = tuple[str, Callable[[Summary], str]]
SHORT = {"presence": "pres.", "relation": "rel.", "counting": "count"}
"""Headings of categories where room is scarce."""
MANY = 8
"""So many categories are columns of their own; more are a table for themselves."""
SIGNIFICANT = 0.05


# ------------------------------------------------------------------ cells


def _number(key: str, digits: int) -> Callable[[Summary], str]:
    return lambda summary: "–" if summary[key] is None else f"{summary[key]:.{digits}f}"


def in_points(value: float, number: Summary) -> float:
    """In percent; a score that is a sum of points, as MME's, stays one."""
    return 100 * value if number["maximum"] == 1 else value


def _value(number: Summary | None) -> str:
    return "–" if number is None else f"{in_points(number['value'], number):.1f}"


def _whole(number: Summary | None) -> str:
    """A score without decimals, for a category's few samples."""
    return "–" if number is None else f"{in_points(number['value'], number):.0f}"


def with_margin(number: Summary | None) -> str:
    """A score and half the width of its interval."""
    if number is None:
        return "–"
    return f"{_value(number)}±{in_points(number['high'] - number['low'], number) / 2:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _difference(summary: Summary) -> str:
    """Points that the mean score of a sample changed by; a star where that is no accident."""
    found = summary["difference"]
    return "–" if found is None else f"{100 * found['value']:+.1f}{'*' if found['p'] < SIGNIFICANT else ' '}"


def _difference_with_interval(summary: Summary) -> str:
    found = summary["difference"]
    if found is None:
        return "–"
    p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f}, {p})"


def budget(summary: Summary) -> str:
    return "–" if summary["method"] == UNPRUNED else str(summary["budget"])


# ------------------------------------------------------------------ columns


def _settings_columns() -> list[Column]:
    return [("method", lambda s: s["method"]), ("budget", budget)]


def _token_columns() -> list[Column]:
    return [
        ("enter", _number("tokens", 0)),
        ("layers", _number("layer_tokens", 0)),
        ("cache", _number("cached_tokens", 0)),
    ]


def _category_columns(summaries: Sequence[Summary], cell: Callable[[Summary | None], str]) -> list[Column]:
    names: dict[str, None] = dict.fromkeys(str(name) for summary in summaries for name in summary["categories"])
    return [(SHORT.get(name, name), lambda s, name=name: cell(s["categories"].get(name))) for name in names]


def _few_categories(summaries: Sequence[Summary]) -> bool:
    return 1 < len({name for summary in summaries for name in summary["categories"]}) <= MANY


def _overall_columns(difference: Callable[[Summary], str]) -> list[Column]:
    return [
        ("score", lambda s: with_margin(s["score"])),
        ("Δ", difference),
        ("agree", lambda s: _percent(s["agreement"])),
    ]


def _other_columns(summaries: Sequence[Summary]) -> list[Column]:
    """Other conventions and means, and what is left where a smaller image fails."""
    names = dict.fromkeys(name for s in summaries for name in s["numbers"] if name != s["headline"])
    columns: list[Column] = [(name, lambda s, name=name: with_margin(s["numbers"].get(name))) for name in names]
    if any(summary["small_image_fails"] for summary in summaries):
        columns.append(("where resize fails", lambda s: with_margin(s["small_image_fails"])))
    return columns


def _cost_columns() -> list[Column]:
    return [
        ("prefill", _number("prefill_ms", 1)),
        ("×", _number("speedup", 2)),
        ("step", _number("decode_ms", 1)),
        ("GFLOP", _number("gflops", 2)),
        ("KiB", _number("cache_kib", 0)),
    ]


def _overview_columns(rows: Sequence[Summary], cell: Callable[[Summary | None], str]) -> list[Column]:
    columns = [*_settings_columns(), ("layers", _number("layer_tokens", 0))]
    columns += [(name, lambda s, name=name: cell(s["scores"].get(name))) for name in (rows[0]["scores"] if rows else ())]
    return [*columns, ("% of unpruned", lambda s: _percent(s["relative"]))]


# ------------------------------------------------------------------ terminal


def print_table(summaries: Sequence[Summary], console: Console) -> None:
    """The table; on a narrow terminal in two or three parts."""
    kinds = _category_columns(summaries, _whole) if _few_categories(summaries) else []
    settings, tokens, overall, costs = _settings_columns(), _token_columns(), _overall_columns(_difference), _cost_columns()
    ways = (
        [settings + tokens + kinds + overall + costs],
        [settings + kinds + overall, settings + tokens + costs],
        [settings + kinds, settings + tokens + overall, settings + costs]
        if kinds
        else [settings + overall, settings + tokens + costs],
    )
    tables = [[_rich_table(summaries, columns) for columns in way] for way in ways]
    fitting = (way for way in tables if max(_width(table, console) for table in way) <= console.width)
    for table in next(fitting, tables[-1]):
        console.print(table)
    console.print(f"[dim]{legend(summaries)}[/dim]")


def print_overview(summaries: dict[str, list[Summary]], console: Console) -> None:
    """All benchmarks side by side, as papers print them."""
    rows = overview(summaries)
    if len(summaries) > 1 and rows:
        console.print(_rich_table(rows, _overview_columns(rows, _value)))


def _width(table: Table, console: Console) -> int:
    """Columns of the terminal that the table takes if nothing is cut off."""
    return table.__rich_measure__(console, console.options.update(max_width=1000)).maximum


def _rich_table(summaries: Sequence[Summary], columns: list[Column]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    # Brackets in a method's name are its options, and no mark-up.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    for heading, _ in columns:
        table.add_column(escape(heading), justify="left" if heading == "method" else "right", no_wrap=True)
    for summary, following in zip(summaries, [*summaries[1:], None], strict=True):
        last_of_method = following is not None and following["method"] != summary["method"]
        style = "bold" if summary["method"] == UNPRUNED else None
        table.add_row(*(escape(value(summary)) for _, value in columns), end_section=last_of_method, style=style)
    return table


def legend(summaries: Sequence[Summary]) -> str:
    """What the headings mean."""
    batch = max((s["batch_size"] or 0 for s in summaries), default=0)
    headline = summaries[0]["headline"] if summaries else "score"
    tests = dict.fromkeys(s["difference"]["test"] for s in summaries if s["difference"])
    test = " or ".join(tests) or "a paired test"
    return (
        f"score: {headline} ± half of its 95 % interval. Δ: change of the samples' mean score from the unpruned model, in "
        f"points; * p < {SIGNIFICANT} by {test}. agree: % of answers that are the unpruned one's. Visual tokens of an image: "
        "enter: those that enter the LLM; layers: mean over its layers; cache: left in the cache after the prompt, mean over "
        "layers. prefill: ms a sample, with vision encoder and selection; ×: times as fast as unpruned; step: ms a new token; "
        f"both in batches of {batch}, medians over batches. GFLOP and KiB: prefill and cache of a sample."
    )


# ------------------------------------------------------------------ markdown


def markdown(summaries: dict[str, list[Summary]], manifest: Row) -> str:
    """Tables for documents, under a line that says on what, with what and how it was measured."""
    parts = [f"{provenance(manifest)}\n"]
    rows = overview(summaries)
    if len(summaries) > 1 and rows:
        parts.append(f"{_markdown_table(rows, _overview_columns(rows, with_margin))}\n")
    for name, found in summaries.items():
        if len(summaries) > 1:
            parts.append(f"## {manifest['benchmarks'][name]['title']}\n")
        parts += _markdown_benchmark(found)
    return "\n".join(parts)


def _markdown_benchmark(summaries: list[Summary]) -> list[str]:
    few, categories = _few_categories(summaries), _category_columns(summaries, with_margin)
    columns = _settings_columns() + _token_columns() + (categories if few else [])
    columns += _overall_columns(_difference_with_interval) + _other_columns(summaries) + _cost_columns()
    parts = [_markdown_table(summaries, columns), f"\n{legend(summaries)}\n"]
    if len(categories) > 1 and not few:
        parts.append(f"{_markdown_table(summaries, _settings_columns() + categories)}\n")
    return parts


def _markdown_table(rows: Sequence[Summary], columns: list[Column]) -> str:
    lines = [markdown_row([heading for heading, _ in columns]), markdown_row(["---"] + ["---:"] * (len(columns) - 1))]
    return "\n".join(lines + [markdown_row([value(row) for _, value in columns]) for row in rows])


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;').strip() for cell in cells)} |"


def provenance(manifest: Row) -> str:
    """Model, data, hardware, versions, date, commit and command of a run, as one line."""
    model, hardware = manifest["model"], manifest["hardware"]
    weights = f"revision {model['revision'][:12]}" if model.get("revision") else f"weights {model['sha256'][:12]}"
    cores = f" ({hardware['cores']} cores, {hardware['threads']} threads)" if "cores" in hardware else ""
    data = "; ".join(f"{one['version']}, {one['samples']} samples" for one in manifest["benchmarks"].values())
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    commit = f", commit {manifest['commit']}" if manifest["commit"] else ""
    command = f" by `{manifest['command']}`" if manifest["command"] else ""
    return (
        f"{model['name']} ({model['dtype']}, {weights}) on {data}; {hardware['device']}{cores}; "
        f"{versions}{commit}; {manifest['date']}{command}."
    )


# ------------------------------------------------------------------ CSV

PLAIN = (
    *("method", "budget", "samples", "errors", "headline", "agreement", "tokens", "layer_tokens", "cached_tokens"),
    *("visual_tokens", "batch_size", "prefill_ms", "speedup", "selection_ms", "decode_ms", "gflops", "cache_kib"),
)
"""Keys of a summary that are columns as they are."""


def to_csv(found: Sequence[tuple[str, dict[str, list[Summary]]]]) -> str:
    """One line for each model, benchmark and setting; scores as they are, in [0, 1] or in points.

    Columns: model, benchmark, :data:`PLAIN`, then value, low and high of the headline, the difference to the unpruned model
    with its p, and each number and each category that some benchmark has.
    """
    lines = [
        _flat(model, name, summary)
        for model, summaries in found
        for name, of_benchmark in summaries.items()
        for summary in of_benchmark
    ]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(model: str, benchmark: str, summary: Summary) -> dict[str, Any]:
    line: dict[str, Any] = {"model": model, "benchmark": benchmark, **{key: summary[key] for key in PLAIN}}
    line |= _bounds("score", summary["score"]) | _bounds("difference", summary["difference"])
    line["difference p"] = summary["difference"]["p"] if summary["difference"] else None
    line |= _bounds("where resize fails", summary["small_image_fails"])
    for name, number in summary["numbers"].items():
        line[name] = number["value"]
    for name, number in summary["categories"].items():
        line[f"category {name}"] = number["value"]
    return line


def _bounds(name: str, number: Summary | None) -> dict[str, Any]:
    return {
        f"{name}{end}": number[key] if number else None for key, end in (("value", ""), ("low", " low"), ("high", " high"))
    }
