"""From the rows of a run to its summary: a JSON file, a table for the terminal and one for documents."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune.evals.metrics import METRIC_OF_KIND, Metric, estimate, pope
from vlprune.evals.runner import Row, write_json
from vlprune.evals.settings import UNPRUNED, Setting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SUMMARY = "summary.json"
MARKDOWN = "table.md"
READING = ("text", "form", "chart")
"""Kinds whose answers are read off a few particular tokens."""

Summary = dict[str, Any]
"""One method at one budget, see :func:`summarise`."""


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary for each method and budget, in order of appearance.

    - ``kinds``: for each kind its metric, score, 95 % interval and number of samples; ``mean``: mean over the kinds;
      ``reading``: mean over :data:`READING`. Scores are in [0, 1], intervals bootstrapped over samples within each kind.
    - ``agreement``: share of samples with the same answer as the unpruned model's; None without an unpruned run.
    - ``tokens``: visual tokens of an image that enter the LLM, of ``visual_tokens`` that it has; ``layer_tokens``: mean over
      the LLM's layers; ``cached_tokens``: left in the cache after the prompt, mean over layers. Means over samples.
    - ``prefill_ms``: from the call of ``generate`` to the end of the first forward, vision encoder and selection included,
      divided by the batch size; median over batches. ``speedup``: unpruned by pruned time of the same batch; median.
    - ``selection_ms``: what the method itself took of it, of one sample; median over batches.
    - ``decode_ms``: one further token for the whole batch; median over batches.
    - ``gflops`` of the prefill and ``cache_kib`` (1024 bytes) of the cache after it, of one sample; means.
    """
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(Setting(row["method"], row["budget"]).label, []).append(row)
    unpruned = by_setting.get(Setting(UNPRUNED).label, [])
    return [_summary(group, unpruned) for group in by_setting.values()]


def _summary(rows: list[Row], unpruned: list[Row]) -> Summary:
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in METRIC_OF_KIND}
    groups = {kind: _group(kind, group) for kind, group in kinds.items() if group}
    reading = [groups[kind] for kind in READING if kind in groups]
    measured = [row for row in rows if row["error"] is None]
    prefill, reference = _prefill(measured), _prefill([row for row in unpruned if row["error"] is None])
    presence = [row for row in measured if row["kind"] == "presence"]
    return {
        "method": rows[0]["method"],
        "budget": rows[0]["budget"],
        "samples": len(rows),
        "errors": len(rows) - len(measured),
        "kinds": {kind: _kind(metric, counts) for kind, (metric, counts) in groups.items()},
        "mean": asdict(estimate(list(groups.values()))),
        "reading": asdict(estimate(reading)) if reading else None,
        "pope": pope([row["prediction"] for row in presence], [row["answers"][0] for row in presence]) if presence else None,
        "agreement": _agreement(rows, unpruned),
        "tokens": _mean(row["tokens"] for row in measured),
        "layer_tokens": _mean(row["layer_tokens"] for row in measured),
        "cached_tokens": _mean(row["cached_tokens"] for row in measured),
        "visual_tokens": _mean(row["visual_tokens"] for row in measured),
        "batch_size": max((row["batch_size"] for row in measured), default=None),
        "prefill_ms": _median(1000 * seconds for seconds in prefill.values()),
        "speedup": _median(reference[batch] / prefill[batch] for batch in prefill if batch in reference),
        "selection_ms": _median(1000 * seconds for seconds in _by_batch(measured, _selection_seconds).values()),
        "decode_ms": _median(1000 * seconds for seconds in _by_batch(measured, _decode_seconds).values()),
        "gflops": _mean(row["flops"] / 1e9 for row in measured),
        "cache_kib": _mean(row["cache_bytes"] / 1024 for row in measured),
    }


def _group(kind: str, rows: list[Row]) -> tuple[Metric, Any]:
    metric = METRIC_OF_KIND[kind]
    return metric, metric.contributions([row["prediction"] for row in rows], [row["answers"] for row in rows])


def _kind(metric: Metric, counts: Any) -> Summary:
    return dict(metric=metric.name, samples=len(counts), **asdict(estimate([(metric, counts)])))


def _agreement(rows: list[Row], unpruned: list[Row]) -> float | None:
    answers = {row["id"]: row["prediction"] for row in unpruned if row["prediction"] is not None}
    return _mean(float(row["prediction"] == answers[row["id"]]) for row in rows if row["id"] in answers)


def _prefill(rows: list[Row]) -> dict[int, float]:
    return _by_batch(rows, lambda row: row["prefill_seconds"] / row["batch_size"])


def _selection_seconds(row: Row) -> float | None:
    return None if row["selection_seconds"] is None else row["selection_seconds"] / row["batch_size"]


def _decode_seconds(row: Row) -> float | None:
    return row["decode_seconds_per_token"]


def _by_batch(rows: list[Row], seconds: Callable[[Row], float | None]) -> dict[int, float]:
    """One value for each batch that ran at full size: a rest, or a batch that was taken apart, has other times."""
    full = max((row["batch_size"] for row in rows), default=0)
    found = {row["batch"]: seconds(row) for row in rows if row["batch_size"] == full}
    return {batch: value for batch, value in found.items() if value is not None}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def write(summaries: list[Summary], manifest: Row, out: Path) -> list[Path]:
    """Writes ``summary.json`` and ``table.md`` into ``out`` and returns their paths."""
    paths = [out / SUMMARY, out / MARKDOWN]
    write_json(paths[0], {"run": manifest, "settings": summaries})
    paths[1].write_text(markdown(summaries, manifest), encoding="utf-8")
    return paths


# ------------------------------------------------------------------ tables

Column = tuple[str, Callable[[Summary], str]]
KIND_HEADINGS = {
    "text": "text",
    "form": "form",
    "chart": "chart",
    "presence": "pres.",
    "relation": "rel.",
    "counting": "count",
}


def _number(key: str, digits: int) -> Callable[[Summary], str]:
    return lambda summary: "–" if summary[key] is None else f"{summary[key]:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _with_margin(score: Summary | None) -> str:
    """Score and half the width of its interval, in percent."""
    return "–" if score is None else f"{_percent(score['value'])} ±{50 * (score['high'] - score['low']):.1f}"


def _budget(summary: Summary) -> str:
    return "–" if summary["method"] == UNPRUNED else str(summary["budget"])


def _settings_columns() -> list[Column]:
    return [("method", lambda s: s["method"]), ("budget", _budget)]


def _token_columns() -> list[Column]:
    return [
        ("enter", _number("tokens", 0)),
        ("layers", _number("layer_tokens", 0)),
        ("cache", _number("cached_tokens", 0)),
    ]


def _kind_columns(score: Callable[[Summary | None], str]) -> list[Column]:
    return [(heading, lambda s, kind=kind: score(s["kinds"].get(kind))) for kind, heading in KIND_HEADINGS.items()]


def _overall_columns() -> list[Column]:
    return [("mean", lambda s: _with_margin(s["mean"])), ("agree", lambda s: _percent(s["agreement"]))]


def _cost_columns() -> list[Column]:
    return [
        ("prefill", _number("prefill_ms", 1)),
        ("×", _number("speedup", 2)),
        ("decode", _number("decode_ms", 1)),
        ("GFLOP", _number("gflops", 2)),
        ("KiB", _number("cache_kib", 0)),
    ]


def print_table(summaries: list[Summary], console: Console) -> None:
    """The table; on a narrow terminal in two or three parts."""
    kinds = _kind_columns(lambda kind: "–" if kind is None else _percent(kind["value"]))
    settings, tokens, overall, costs = _settings_columns(), _token_columns(), _overall_columns(), _cost_columns()
    ways = (
        [settings + tokens + kinds + overall + costs],
        [settings + kinds + overall, settings + tokens + costs],
        [settings + kinds, settings + tokens + overall, settings + costs],
    )
    tables = [[_rich_table(summaries, columns) for columns in way] for way in ways]
    fitting = (way for way in tables if max(_width(table, console) for table in way) <= console.width)
    for table in next(fitting, tables[-1]):
        console.print(table)
    console.print(f"[dim]{legend(summaries)}[/dim]")


def _width(table: Table, console: Console) -> int:
    """Columns of the terminal that the table takes if nothing is cut off."""
    return table.__rich_measure__(console, console.options.update(max_width=1000)).maximum


def _rich_table(summaries: list[Summary], columns: list[Column]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    # Brackets in a method's name are its options, and no mark-up.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    for heading, _ in columns:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for summary, following in zip(summaries, [*summaries[1:], None], strict=True):
        last_of_method = following is not None and following["method"] != summary["method"]
        style = "bold" if summary["method"] == UNPRUNED else None
        table.add_row(*(escape(value(summary)) for _, value in columns), end_section=last_of_method, style=style)
    return table


def legend(summaries: list[Summary]) -> str:
    """What the headings mean."""
    metrics = ", ".join(f"{kind} {metric.name}" for kind, metric in METRIC_OF_KIND.items())
    batch = max((s["batch_size"] or 0 for s in summaries), default=0)
    return (
        f"Scores in percent: {metrics}; mean over the kinds ± half of its 95 % interval. agree: same answer as unpruned. "
        "Visual tokens of an image: enter: those that enter the LLM; layers: mean over its layers; cache: left in the cache "
        "after the prompt, mean over layers. prefill: ms a sample, vision encoder and selection included; "
        f"×: times as fast as unpruned; decode: ms a step; both in batches of {batch}, medians over batches. "
        "GFLOP and KiB: prefill and cache of a sample."
    )


def markdown(summaries: list[Summary], manifest: Row) -> str:
    """The table for documents, under a line that says on what, with what and how it was measured."""
    columns = _settings_columns() + _token_columns() + _kind_columns(_with_margin) + _overall_columns() + _cost_columns()
    lines = [_markdown_row([heading for heading, _ in columns]), _markdown_row(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [_markdown_row([value(summary) for _, value in columns]) for summary in summaries]
    return "\n".join([f"{_provenance(manifest)}\n", *lines, f"\n{legend(summaries)}\n"])


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(manifest: Row) -> str:
    """Model, data, hardware, versions, date, commit and command of a run, as one line."""
    model, data, hardware = manifest["model"], manifest["data"], manifest["hardware"]
    cores = f" ({hardware['cores']} cores, {hardware['threads']} threads)" if "cores" in hardware else ""
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    commit = f", commit {manifest['commit']}" if manifest["commit"] else ""
    command = f" by `{manifest['command']}`" if manifest["command"] else ""
    return (
        f"{model['name']} ({model['dtype']}, weights {model['sha256'][:12]}) on {data['name']}, {data['samples']} samples; "
        f"{hardware['device']}{cores}; {versions}{commit}; {manifest['date']}{command}."
    )
