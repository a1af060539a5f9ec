"""Puts measurements into the documents: README, choosing, docs/results, a table and a curve for each method.

Usage: ``python docs/publish.py results/eval results/eval-tinyvlm-qwen``, either alone or both. What was published of the
other model before is kept. A run with methods like ``hired[config=tinyvlm-hired]`` goes to docs/calibration.md, one of
``--methods all`` to docs/results/all-methods.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import all_methods
import compared
from cells import (
    DOCS,
    MEAN,
    READING,
    Summary,
    budget_of,
    conditions,
    fill,
    name_of,
    score_of,
    settings_of,
    speed_of,
    table_row,
    tokens_of,
    without_folder,
)

from vlprune import presets
from vlprune.evals import journal, plot
from vlprune.evals.compare import difference

BASELINE = "uniform"
"""Drawn beside each method's own curve."""
TYPICAL = 0.4
"""The budget in README, or what a method has that is nearest."""

COMPARED = (0.4, 0.2, 0.1)
"""Budgets of the tables for choosing."""

CALIBRATED = "results/calibrated.json"
"""Calibrated settings beside the published ones, by model."""


class Page(NamedTuple):
    """Where a model's results stand below docs/."""

    page: str
    picture: str
    summary: str


PAGES = {
    "TinyVLM": Page("results/README.md", "images/accuracy.png", "results/summary.json"),
    "TinyVLM-Qwen": Page("results/tinyvlm-qwen.md", "images/accuracy-qwen.png", "results/summary-tinyvlm-qwen.json"),
}


def main(folders: list[Path]) -> None:
    for folder in folders:
        _take(folder)
    published = {model: json.loads((DOCS / page.summary).read_text()) for model, page in PAGES.items() if _is_there(page)}
    names = {name_of(row) for summary in published.values() for row in settings_of(summary)} - {"none"}
    for name in sorted(names):
        page = DOCS / "methods" / f"{name}.md"
        if page.exists():
            fill(page, name, _method(name, published))
    if (DOCS / compared.RESULTS).exists():
        all_methods.publish(measured=names)
    fill(DOCS.parent / "README.md", "readme", _overview(published))
    fill(DOCS / "choosing.md", "choosing", _choosing(published))
    fill(DOCS / "choosing.md", "presets", _presets(published))
    _tell_presets(published)
    fill(DOCS / "calibration.md", "calibrated", _calibrated(json.loads((DOCS / CALIBRATED).read_text())))


def _is_there(page: Page) -> bool:
    return (DOCS / page.summary).exists() and (DOCS / page.page).exists()


def _take(folder: Path) -> None:
    """Copies the results of one model; its name tells where."""
    summary = json.loads((folder / "summary.json").read_text())
    model = summary["run"]["model"]["name"]
    if any("config=" in row["method"] for row in settings_of(summary)):
        _take_calibrated(folder, summary)
        return
    if compared.is_one(summary):
        compared.take(folder, summary)
        return
    page = PAGES[model]
    (DOCS / "images").mkdir(exist_ok=True)
    shutil.copy(folder / "accuracy.png", DOCS / page.picture)
    (DOCS / page.summary).write_text(without_folder((folder / "summary.json").read_text()))
    others = ", ".join(f"[{other}]({Path(p.page).name})" for other, p in PAGES.items() if other != model and _is_there(p))
    also = f" Also measured: {others}." if others else ""
    text = (
        f"# Measured: {model}\n\n{without_folder((folder / 'table.md').read_text())}\n"
        f"Curves are drawn by the mean over the LLM's layers, of a method that only evicts by what is left in the cache."
        f"{also}\n\n![Accuracy against visual tokens](../{page.picture})\n"
    )
    (DOCS / page.page).write_text(text)


def _take_calibrated(folder: Path, summary: Summary) -> None:
    """Accuracies of calibrated settings and of the published ones, and what lies between them, sample by sample."""
    known: dict[str, list[Summary]] = {}
    for row in journal.read_rows(folder):
        known.setdefault(f"{row['method']} {row['budget']}", []).append(row)
    rows = []
    for row in settings_of(summary):
        if "config=" in row["method"]:
            plain = next(
                one for one in settings_of(summary) if (one["method"], one["budget"]) == (name_of(row), row["budget"])
            )
            mine, theirs = (known[f"{one['method']} {one['budget']}"] for one in (row, plain))
            change = difference(mine, theirs)
            pair = {name: _plain(one) for name, one in (("published", plain), ("calibrated", row))}
            numbers = {"value": change.value, "low": change.low, "high": change.high, "p": change.p}
            rows.append({"method": name_of(row), "budget": row["budget"], **pair, "difference": numbers})
    kept = json.loads((DOCS / CALIBRATED).read_text()) if (DOCS / CALIBRATED).exists() else {}
    run = json.loads(without_folder((folder / "summary.json").read_text()))["run"]
    # Settings may have joined in a later session of the run, which names them all.
    run["command"] = without_folder(journal.read_manifest(folder)["sessions"][-1]["command"])
    kept[summary["run"]["model"]["name"]] = {"run": run, "settings": rows}
    (DOCS / CALIBRATED).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _plain(row: Summary) -> Summary:
    return {name: row[name] for name in ("method", "budget", "numbers", "layer_tokens", "cached_tokens")}


# ------------------------------------------------------------------ a method's page


def _method(name: str, published: dict[str, Any]) -> str:
    """A picture and a table for each model that the method was measured with."""
    parts, shown = [], []
    for model, summary in published.items():
        rows = [row for row in settings_of(summary) if name_of(row) == name]
        if rows:
            unpruned = [row for row in settings_of(summary) if row["method"] == "none"]
            parts.append(f"{conditions(summary['run'])}\n\n{_table(unpruned + rows)}\n")
            beside = [row for row in settings_of(summary) if row["method"] == BASELINE and name != BASELINE]
            shown.append(plot.Panel(unpruned + rows + beside, MEAN, model))
    picture = f"images/methods/{name}.png"
    (DOCS / picture).parent.mkdir(exist_ok=True)
    plot.figure(shown).savefig(DOCS / picture, dpi=90)
    parts.append(f"![{name}: accuracy against visual tokens](../{picture})\n")
    pages = ", ".join(f"[{model}](../{PAGES[model].page})" for model in published)
    everywhere = f"With all others at fewer tokens: [all methods](../{all_methods.PAGE})."
    return "\n".join([*parts, f"These methods in one table and picture: {pages}. {everywhere}"])


def _table(rows: list[Summary]) -> str:
    head = ["method", "budget", "enter", "layers", "cache", "mean accuracy", "text, form, chart", "agreement", "prefill"]
    lines = [table_row([*head, "speed-up", "decode"]), table_row(["---"] + ["---:"] * (len(head) + 1))]
    for row in rows:
        cells = [row["method"], budget_of(row), *tokens_of(row), score_of(row, MEAN), score_of(row, READING)]
        cells += [f"{100 * row['agreement']:.1f} %", *speed_of(row), f"{row['decode_ms']:.1f} ms"]
        lines.append(table_row(cells))
    lines.append(
        "\nVisual tokens of an image that enter the LLM, as a mean over its layers, and left in the cache after the prompt."
    )
    return "\n".join(lines)


# ------------------------------------------------------------------ README


def _overview(published: dict[str, Any]) -> str:
    """One row for each method at a typical budget: the first model's numbers, and the accuracy of the others."""
    (first, summary), *others = published.items()
    head = ["method", "budget", "layers", "cache", f"mean accuracy, {first}", "text, form, chart", "prefill", "speed-up"]
    head += [f"mean accuracy, {model}" for model, _ in others]
    lines = [table_row(head), table_row(["---"] + ["---:"] * (len(head) - 1))]
    for row in _typical(settings_of(summary)):
        cells = [
            row["method"],
            budget_of(row),
            *tokens_of(row)[1:],
            score_of(row, MEAN),
            score_of(row, READING),
            *speed_of(row),
        ]
        lines.append(table_row(cells + [score_of(_same(row, settings_of(other)), MEAN) for _, other in others]))
    lines.append("\nlayers, cache: visual tokens of an image as a mean over the LLM's layers, and left in the cache.")
    return "\n\n".join([conditions(summary["run"]), "\n".join(lines)])


def _typical(rows: list[Summary]) -> list[Summary]:
    """Of each method the row whose budget is nearest to :data:`TYPICAL`."""
    methods = dict.fromkeys(row["method"] for row in rows)
    fractions = [row for row in rows if isinstance(row["budget"], float)]
    return [
        min((row for row in fractions if row["method"] == method), key=lambda row: abs(row["budget"] - TYPICAL))
        for method in methods
        if any(row["method"] == method for row in fractions)
    ]


def _same(row: Summary, rows: list[Summary]) -> Summary | None:
    return next((other for other in rows if (other["method"], other["budget"]) == (row["method"], row["budget"])), None)


# ------------------------------------------------------------------ choosing


def _choosing(published: dict[str, Any]) -> str:
    """For each of some budgets the methods by accuracy, and the best one for each kind of question."""
    models = list(published)
    head = ["method", "accuracy", "text, form, chart", "prefill", "speed-up", "in the cache"]
    parts = [conditions(summary["run"]) for summary in published.values()]
    for budget in COMPARED:
        for model in models:
            rows = [row for row in settings_of(published[model]) if row["budget"] == budget]
            rows.sort(key=lambda row: -row["numbers"][MEAN]["value"])
            lines = [table_row(head), table_row(["---"] + ["---:"] * (len(head) - 1))]
            for row in rows:
                cells = [f"[{row['method']}](methods/{name_of(row)}.md)", score_of(row, MEAN), score_of(row, READING)]
                lines.append(table_row([*cells, *speed_of(row), f"{row['cached_tokens']:.0f}"]))
            parts += [f"**{model}, {100 * budget:.0f} % of the visual tokens**", "\n".join(lines)]
    return "\n\n".join([*parts, _by_kind(published)])


def _by_kind(published: dict[str, Any]) -> str:
    """The method with the most right answers to each kind of question, among those that shorten the prefill."""
    kinds = list(settings_of(next(iter(published.values())))[0]["categories"])
    columns = [(model, budget) for model in published for budget in COMPARED]
    head = ["kind", *(f"{model}, {100 * budget:.0f} %" for model, budget in columns)]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for kind in kinds:
        cells = [kind]
        for model, budget in columns:
            rows = [row for row in settings_of(published[model]) if row["budget"] == budget]
            shorter = [row for row in rows if row["layer_tokens"] < row["visual_tokens"]]
            best = max(shorter, key=lambda row: row["categories"][kind]["value"])
            cells.append(f"{best['method']}, {100 * best['categories'][kind]['value']:.0f} %")
        lines.append(table_row(cells))
    return "**By kind of question**: the most accurate of the methods that shorten the prefill.\n\n" + "\n".join(lines)


# ------------------------------------------------------------------ presets and calibrated settings


def _presets(published: dict[str, Any]) -> str:
    """What ``vlprune.apply(model)`` does, and what was measured of it."""
    head = [
        "model",
        "preset",
        "method",
        "budget",
        "accuracy",
        "unpruned",
        "prefill",
        "speed-up",
        "in the cache",
        "why",
    ]
    lines = [table_row(head), table_row(["---"] * 3 + ["---:"] * 6 + ["---"])]
    for kind, named in presets.PRESETS.items():
        model = presets.MEASURED_ON[kind]
        rows = settings_of(published[model]) if model in published else []
        unpruned = next((row for row in rows if row["method"] == "none"), None)
        for name, preset in named.items():
            found = next((row for row in rows if (row["method"], row["budget"]) == (preset.method, preset.budget)), None)
            cost = (
                [*speed_of(found), f"{found['cached_tokens']:.0f}"] if found else ["[TinyViT](results/tinyvit.md)", "–", "–"]
            )
            cells = [kind, f"`{name}`", f"[{preset.method}](methods/{preset.method}.md)", str(preset.budget)]
            lines.append(table_row([*cells, score_of(found, MEAN), score_of(unpruned, MEAN), *cost, preset.why]))
    return "\n".join(lines)


def as_good(rows: list[Summary], preset: presets.Preset) -> list[str]:
    """Methods that a preset may name: at its budget, those that the interval of the most accurate one does not tell from it.

    Of the methods that shorten the prefill, but for ``quality``, where all count. Those with the shortest prefill come first.
    """
    there = [row for row in rows if row["budget"] == preset.budget and row["method"] != "none"]
    if preset.why != presets.LEAST:
        there = [row for row in there if row["layer_tokens"] < row["visual_tokens"]]
    low = max((row["numbers"][MEAN] for row in there), key=lambda number: number["value"], default={"low": 1.0})["low"]
    good = [row for row in there if row["numbers"][MEAN]["value"] >= low]
    return [row["method"] for row in sorted(good, key=lambda row: row["prefill_ms"])]


def _tell_presets(published: dict[str, Any]) -> None:
    """Says where a new measurement would have a preset name another method."""
    for kind, named in presets.PRESETS.items():
        rows = settings_of(published[presets.MEASURED_ON[kind]]) if presets.MEASURED_ON[kind] in published else []
        for name, preset in named.items():
            good = as_good(rows, preset)
            if rows and preset.method != (good or [None])[0]:
                what = f"vlprune/presets.py: {kind}, {name}: {preset.method} {preset.budget}"
                sys.stderr.write(f"{what}; as good as any, quickest first: {', '.join(good)}\n")


def _calibrated(results: dict[str, Any]) -> str:
    """Published settings beside calibrated ones, on questions that the search has not seen."""
    head = ["model", "method", "budget", "published settings", "calibrated", "difference of all samples", "p"]
    parts, lines = [], [table_row(head), table_row(["---", "---", *["---:"] * 5])]
    for model, result in results.items():
        parts.append(conditions(result["run"]))
        for row in result["settings"]:
            change = row["difference"]
            value, low, high = (f"{100 * change[name]:+.1f}" for name in ("value", "low", "high"))
            scores = [score_of(row[name], MEAN) for name in ("published", "calibrated")]
            p = "< 0.001" if change["p"] < 0.001 else f"{change['p']:.3f}"
            lines.append(table_row([model, row["method"], str(row["budget"]), *scores, f"{value} ({low} to {high})", p]))
    return "\n\n".join([*parts, "\n".join(lines)])


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
