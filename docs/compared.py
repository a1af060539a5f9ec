"""What the page of all methods is made of: runs of ``vlprune eval --methods all``, and in what order methods stand there.

A run of each model leaves what the page needs in docs/results/all-methods.json, without times: such a run is long, and they
hold what else the machine does meanwhile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cells import DOCS, MEAN, Summary, name_of, settings_of, without_folder

import vlprune
from vlprune import listing
from vlprune.evals import journal, plot
from vlprune.evals.compare import difference, holm

RESULTS = "results/all-methods.json"
MANY = 20
"""A run of more methods than this is one of all."""
UNPRUNED, AGAINST = "none", "random"
KEPT = ("method", "budget", "samples", "errors", "tokens", "layer_tokens", "cached_tokens", "visual_tokens", "gflops")
KEPT += ("cache_kib", "agreement")
"""What stays of a setting's summary as it is."""

SHORTER, CACHE, OWN, BASELINES = "Fewer tokens in the prefill", "Whole prefill, smaller cache", "Count by content", "Baselines"
"""Parts of the page."""

Results = dict[str, Any]
"""Model -> ``run``, ``not_possible`` (setting -> why), ``settings``."""


def is_one(summary: Summary) -> bool:
    """Whether a run is of all methods."""
    return len({name_of(row) for row in settings_of(summary)}) > MANY


# ------------------------------------------------------------------ from a run to what is kept


def take(folder: Path, summary: Summary) -> None:
    """Adds the run in ``folder`` to what is kept, in place of an earlier one of the same model."""
    run = json.loads(without_folder(json.dumps(summary["run"])))
    questions = next(iter(run["benchmarks"].values()))["samples"]
    short = [f"{row['method']} {row['budget']}" for row in settings_of(summary) if row["samples"] != questions]
    if short:
        sys.exit(f"{folder} is not complete: {', '.join(short)}")
    kept: Results = read() if (DOCS / RESULTS).exists() else {}
    impossible = {label: why for session in run["sessions"] for label, why in session.get("not_possible", {}).items()}
    run = {key: run[key] for key in ("model", "benchmarks", "versions", "hardware", "date", "commit", "command")}
    kept[run["model"]["name"]] = {"run": run, "not_possible": impossible, "settings": _compared(folder, summary)}
    (DOCS / RESULTS).write_text(_written(dict(sorted(kept.items()))))


def _written(kept: Results) -> str:
    """JSON with a line for each setting."""
    models = []
    for model, result in kept.items():
        run, impossible = (json.dumps(result[key], ensure_ascii=False) for key in ("run", "not_possible"))
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["settings"])
        models.append(f'{json.dumps(model)}: {{\n"run": {run},\n"not_possible": {impossible},\n"settings": [\n{rows}\n]}}')
    return "{\n" + ",\n".join(models) + "\n}\n"


def read() -> Results:
    return json.loads((DOCS / RESULTS).read_text())


def _compared(folder: Path, summary: Summary) -> list[Summary]:
    """Settings of a run; ``over_random`` is the difference to that baseline at the same budget, question by question."""
    rows: dict[tuple[str, float], list[Any]] = {}
    for row in journal.read_rows(folder):
        rows.setdefault((row["method"], row["budget"]), []).append(row)
    found = [_slim(row) for row in settings_of(summary)]
    tested = [row for row in found if _is_compared(row, found)]
    for row in tested:
        change = difference(rows[row["method"], row["budget"]], rows[AGAINST, row["budget"]])
        row["over_random"] = {key: round(getattr(change, key), 6) for key in ("value", "low", "high", "p")}
    for row, p in zip(tested, holm([row["over_random"]["p"] for row in tested]), strict=True):
        row["over_random"]["holm"] = round(p, 6)
    return found


def _slim(row: Summary) -> Summary:
    numbers = {
        name: {key: round(number[key], 5) for key in ("value", "low", "high", "maximum")}
        for name, number in row["numbers"].items()
    }
    categories = {name: round(number["value"], 5) for name, number in row["categories"].items()}
    plain = {key: round(row[key], 4) if isinstance(row[key], float) else row[key] for key in KEPT}
    return plain | {"numbers": numbers, "categories": categories}


def _is_compared(row: Summary, rows: Sequence[Summary]) -> bool:
    """Whether there is a draw of as many tokens."""
    if row["method"] in (UNPRUNED, AGAINST) or _part([one for one in rows if name_of(one) == name_of(row)]) in (OWN, None):
        return False
    return any((one["method"], one["budget"]) == (AGAINST, row["budget"]) for one in rows)


# ------------------------------------------------------------------ which methods stand where


@cache
def known() -> dict[str, dict[str, Any]]:
    return {name: listing.described(name, cls) for name, cls in vlprune.methods().items()}


def _part(rows: Sequence[Summary]) -> str | None:
    """The part of the page where a method with these settings stands; None for one that left everything where it was."""
    name = name_of(rows[0])
    if name in plot.BASELINES:
        return BASELINES
    if all(row["cached_tokens"] == row["layer_tokens"] == row["visual_tokens"] for row in rows):
        return None
    amounts = {(row["layer_tokens"], row["cached_tokens"]) for row in rows}
    if known()[name]["adaptive"] and len(amounts) < len(rows):
        return OWN
    return CACHE if all(row["layer_tokens"] == row["visual_tokens"] for row in rows) else SHORTER


def parts(results: Results) -> dict[str, list[str]]:
    """Parts of the page, and in each the methods in their order: the mean score of the models at the middle budget.

    Methods that not all models have at that budget come last.
    """
    rows = [row for result in results.values() for row in result["settings"] if row["method"] != UNPRUNED]
    names = dict.fromkeys(map(name_of, rows))
    found: dict[str, list[str]] = {SHORTER: [], CACHE: [], OWN: [], BASELINES: []}
    for name in sorted(names, key=lambda name: _rank(name, results)):
        part = _part([row for row in rows if name_of(row) == name])
        if part is not None:
            found[part].append(name)
    return found


def _rank(name: str, results: Results) -> tuple[int, float]:
    middle = [row for model in results if (row := find(results, model, name, budgets(results)[1]))]
    rows = middle or [row for result in results.values() for row in result["settings"] if name_of(row) == name]
    return len(results) - len(middle), -sum(row["numbers"][MEAN]["value"] for row in rows) / len(rows)


def budgets(results: Results) -> list[float]:
    """Largest first."""
    rows = [row for result in results.values() for row in result["settings"] if row["method"] == AGAINST]
    return sorted({row["budget"] for row in rows}, reverse=True)


def find(results: Results, model: str, name: str, budget: float | None = None) -> Summary | None:
    """A method's setting at ``budget``, or its first."""
    rows = (row for row in results[model]["settings"] if name_of(row) == name and budget in (None, row["budget"]))
    return next(rows, None)
