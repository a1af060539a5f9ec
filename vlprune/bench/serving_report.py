"""Tables and a picture of ``vlprune bench serve``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune.bench import serving, tables
from vlprune.bench.journal import Row
from vlprune.evals.plot import STYLES
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from rich.console import Console

PICTURE = "serving.png"
LEGEND = (
    "at a time: requests under way. prompt: tokens of a prompt as the server counts them, text and image. first token, each "
    "further: medians over requests (20th to 80th percentile), in milliseconds. requests/s, tokens/s: answered and generated, "
    "all together. throughput: requests/s by those of the unpruned server at as many at a time."
)
HOW = (
    "`vlprune bench serve` starts one server of vLLM after the other, without pruning and with, and runs vLLM's own benchmark "
    "against each: prompts of random words with a picture of noise, the same for each server, others at each concurrency, so "
    "that no cache knows them. Weights of a size that is named *small* are random."
)
AGAIN = (
    " *none again* is the unpruned server once more, after all others: how far it is from itself tells what can be told apart."
)


def columns() -> list[tables.Column]:
    return [
        ("at a time", tables.number("concurrency", 0)),
        ("method", tables.method_of),
        ("budget", tables.budget_of),
        ("prompt", tables.number("prompt_tokens", 0)),
        ("first token ms", tables.spread("first_ms")),
        ("each further ms", tables.spread("next_ms")),
        ("requests/s", tables.number("requests_per_s", 2)),
        ("tokens/s", tables.number("tokens_per_s", 0)),
        ("throughput", tables.number("times", 2, unit="x")),
    ]


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what they were measured on and with, by concurrency; of rows that were measured again, the last."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        title = f"{row['model']}, images of {row['image']}, {row['new_tokens']} new tokens, {row['device']}"
        found.setdefault(title, {})[serving.keys(row)] = row
    return {title: _compared(list(group.values())) for title, group in found.items()}


def _compared(group: list[Row]) -> list[Row]:
    """With ``times``: requests a second by those of the unpruned server."""
    whole = {
        row.get("concurrency"): row.get("requests_per_s")
        for row in group
        if row["method"] == UNPRUNED and not row.get("repeat")
    }
    for row in group:
        base, found = whole.get(row.get("concurrency")), row.get("requests_per_s")
        row["times"] = found / base if base and found else None
    return sorted(group, key=lambda row: row.get("concurrency") or 0)


def show(rows: Sequence[Row], console: Console) -> None:
    tables.show_settings(grouped(rows), columns(), console, LEGEND)


def page(rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """Everything that was measured, with the hardware named."""
    links = [f"![First token and throughput against concurrency]({path})" for path in pictures]
    parts = [
        f"## {title}\n\n{tables.provenance(group)}\n\n{tables.markdown(group, columns())}"
        for title, group in grouped(rows).items()
    ]
    head = "# Measured: serving with vLLM\n\nHow to serve: [serving](../serving.md)."
    how = HOW + AGAIN * any(row.get("repeat") for row in rows)
    return "\n\n".join([head, how, *links, *parts, LEGEND]) + "\n"


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes ``serving.png``: time to the first token and requests a second against concurrency, for each group of rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {title: [row for row in group if row.get("requests_per_s")] for title, group in grouped(rows).items()}
    groups = {title: group for title, group in groups.items() if group}
    if not groups:
        return []
    figure = Figure(figsize=(9.0, 4.0 * len(groups)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(groups), 2, squeeze=False)
    for (first, throughput), (title, group) in zip(axes, groups.items(), strict=True):
        _lines(first, group, lambda row: row["first_ms_p50"] / 1000, "seconds to the first token, median")
        _lines(throughput, group, lambda row: row["requests_per_s"], "requests answered a second")
        first.set_title(title, fontsize=9, loc="left")
        throughput.legend(frameon=False, fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / PICTURE)
    return [out / PICTURE]


def _lines(axes: Any, group: Sequence[Row], value: Callable[[Row], float], label: str) -> None:
    found: dict[str, list[Row]] = {}
    for row in group:
        found.setdefault(" ".join([tables.method_of(row), *[row["budget"]] * (row["method"] != UNPRUNED)]), []).append(row)
    for number, (name, points) in enumerate(found.items()):
        colour, marker = STYLES[number % len(STYLES)]
        axes.plot([row["concurrency"] for row in points], list(map(value, points)), color=colour, marker=marker, label=name)
    ticks = sorted({row["concurrency"] for row in group})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_yscale("log")
    axes.set_xlabel("requests under way at a time")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
