"""Puts measurements into the documents: README, choosing, docs/results, a table and a curve for each method.

Usage: ``python docs/publish.py results/eval results/eval-tinyvlm-qwen``, either alone or both. What was published of the
other model before is kept. A run with methods like ``hired[config=tinyvlm-hired]`` goes to docs/calibration.md.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from vlprune import presets
from vlprune.evals import journal, plot
from vlprune.evals.compare import difference

DOCS = Path(__file__).parent
BENCHMARK = "synthvqa"
MEAN, READING = "mean over kinds", "text, form, chart"
"""Numbers of SynthVQA."""
BASELINE = "uniform"
"""Drawn beside each method's own curve."""
TYPICAL = 0.4
"""The budget in README, or what a method has that is nearest."""

COMPARED = (0.4, 0.2, 0.1)
"""Budgets of the tables for choosing."""

CALIBRATED = "results/calibrated.json"
"""Calibrated settings beside the published ones, by model."""

Summary = dict[str, Any]


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
    names = {_name(row) for summary in published.values() for row in _settings(summary)} - {"none"}
    for name in sorted(names):
        page = DOCS / "methods" / f"{name}.md"
        if page.exists():
            _fill(page, name, _method(name, published))
    _fill(DOCS.parent / "README.md", "readme", _overview(published))
    _fill(DOCS / "choosing.md", "choosing", _choosing(published))
    _fill(DOCS / "choosing.md", "presets", _presets(published))
    _tell_presets(published)
    _fill(DOCS / "calibration.md", "calibrated", _calibrated(json.loads((DOCS / CALIBRATED).read_text())))


def _is_there(page: Page) -> bool:
    return (DOCS / page.summary).exists() and (DOCS / page.page).exists()


def _take(folder: Path) -> None:
    """Copies the results of one model; its name tells where."""
    summary = json.loads((folder / "summary.json").read_text())
    model = summary["run"]["model"]["name"]
    if any("config=" in row["method"] for row in _settings(summary)):
        _take_calibrated(folder, summary)
        return
    page = PAGES[model]
    (DOCS / "images").mkdir(exist_ok=True)
    shutil.copy(folder / "accuracy.png", DOCS / page.picture)
    (DOCS / page.summary).write_text(_without_folder(folder / "summary.json"))
    others = ", ".join(f"[{other}]({Path(p.page).name})" for other, p in PAGES.items() if other != model and _is_there(p))
    also = f" Also measured: {others}." if others else ""
    text = (
        f"# Measured: {model}\n\n{_without_folder(folder / 'table.md')}\n"
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
    for row in _settings(summary):
        if "config=" in row["method"]:
            plain = next(one for one in _settings(summary) if (one["method"], one["budget"]) == (_name(row), row["budget"]))
            mine, theirs = (known[f"{one['method']} {one['budget']}"] for one in (row, plain))
            change = difference(mine, theirs)
            pair = {name: _plain(one) for name, one in (("published", plain), ("calibrated", row))}
            numbers = {"value": change.value, "low": change.low, "high": change.high, "p": change.p}
            rows.append({"method": _name(row), "budget": row["budget"], **pair, "difference": numbers})
    kept = json.loads((DOCS / CALIBRATED).read_text()) if (DOCS / CALIBRATED).exists() else {}
    run = json.loads(_without_folder(folder / "summary.json"))["run"]
    # Settings may have joined in a later session of the run, which names them all.
    run["command"] = re.sub(r" --out [^\s`\"]+", "", journal.read_manifest(folder)["sessions"][-1]["command"])
    kept[summary["run"]["model"]["name"]] = {"run": run, "settings": rows}
    (DOCS / CALIBRATED).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _plain(row: Summary) -> Summary:
    return {name: row[name] for name in ("method", "budget", "numbers", "layer_tokens", "cached_tokens")}


def _without_folder(path: Path) -> str:
    """A file of a run; commands in it do not tell where the rows went."""
    return re.sub(r" --out [^\s`\"]+", "", path.read_text())


def _settings(summary: Summary) -> list[Summary]:
    return summary["benchmarks"][BENCHMARK]["settings"]


def _name(row: Summary) -> str:
    """The method without its options."""
    return row["method"].partition("[")[0]


# ------------------------------------------------------------------ a method's page


def _method(name: str, published: dict[str, Any]) -> str:
    """A picture and a table for each model that the method was measured with."""
    parts, shown = [], []
    for model, summary in published.items():
        rows = [row for row in _settings(summary) if _name(row) == name]
        if rows:
            unpruned = [row for row in _settings(summary) if row["method"] == "none"]
            parts.append(f"{_conditions(summary['run'])}\n\n{_table(unpruned + rows)}\n")
            beside = [row for row in _settings(summary) if row["method"] == BASELINE and name != BASELINE]
            shown.append(plot.Panel(unpruned + rows + beside, MEAN, model))
    picture = f"images/methods/{name}.png"
    (DOCS / picture).parent.mkdir(exist_ok=True)
    plot.figure(shown).savefig(DOCS / picture, dpi=90)
    parts.append(f"![{name}: accuracy against visual tokens](../{picture})\n")
    pages = ", ".join(f"[{model}](../{PAGES[model].page})" for model in published)
    return "\n".join([*parts, f"All methods in one table and picture: {pages}."])


def _conditions(run: Summary) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    hardware, data = run["hardware"], run["benchmarks"][BENCHMARK]
    cores = f", {hardware['cores']} cores" if "cores" in hardware else ""
    return (
        f"{run['model']['name']} on {data['version']}, {data['samples']} questions; {hardware['device']}{cores}; "
        f"{versions}, commit {run['commit']}; `{run['command']}`."
    )


def _table(rows: list[Summary]) -> str:
    head = ["method", "budget", "enter", "layers", "cache", "mean accuracy", "text, form, chart", "agreement", "prefill"]
    lines = [_row([*head, "speed-up", "decode"]), _row(["---"] + ["---:"] * (len(head) + 1))]
    for row in rows:
        cells = [row["method"], _budget(row), *_tokens(row), _score(row, MEAN), _score(row, READING)]
        cells += [f"{100 * row['agreement']:.1f} %", *_speed(row), f"{row['decode_ms']:.1f} ms"]
        lines.append(_row(cells))
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
    lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
    for row in _typical(_settings(summary)):
        cells = [row["method"], _budget(row), *_tokens(row)[1:], _score(row, MEAN), _score(row, READING), *_speed(row)]
        lines.append(_row(cells + [_score(_same(row, _settings(other)), MEAN) for _, other in others]))
    lines.append("\nlayers, cache: visual tokens of an image as a mean over the LLM's layers, and left in the cache.")
    return "\n\n".join([_conditions(summary["run"]), "\n".join(lines)])


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
    parts = [_conditions(summary["run"]) for summary in published.values()]
    for budget in COMPARED:
        for model in models:
            rows = [row for row in _settings(published[model]) if row["budget"] == budget]
            rows.sort(key=lambda row: -row["numbers"][MEAN]["value"])
            lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
            for row in rows:
                cells = [f"[{row['method']}](methods/{_name(row)}.md)", _score(row, MEAN), _score(row, READING)]
                lines.append(_row([*cells, *_speed(row), f"{row['cached_tokens']:.0f}"]))
            parts += [f"**{model}, {100 * budget:.0f} % of the visual tokens**", "\n".join(lines)]
    return "\n\n".join([*parts, _by_kind(published)])


def _by_kind(published: dict[str, Any]) -> str:
    """The method with the most right answers to each kind of question, among those that shorten the prefill."""
    kinds = list(_settings(next(iter(published.values())))[0]["categories"])
    columns = [(model, budget) for model in published for budget in COMPARED]
    head = ["kind", *(f"{model}, {100 * budget:.0f} %" for model, budget in columns)]
    lines = [_row(head), _row(["---"] * len(head))]
    for kind in kinds:
        cells = [kind]
        for model, budget in columns:
            rows = [row for row in _settings(published[model]) if row["budget"] == budget]
            shorter = [row for row in rows if row["layer_tokens"] < row["visual_tokens"]]
            best = max(shorter, key=lambda row: row["categories"][kind]["value"])
            cells.append(f"{best['method']}, {100 * best['categories'][kind]['value']:.0f} %")
        lines.append(_row(cells))
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
    lines = [_row(head), _row(["---"] * 3 + ["---:"] * 6 + ["---"])]
    for kind, named in presets.PRESETS.items():
        model = presets.MEASURED_ON[kind]
        rows = _settings(published[model]) if model in published else []
        unpruned = next((row for row in rows if row["method"] == "none"), None)
        for name, preset in named.items():
            found = next((row for row in rows if (row["method"], row["budget"]) == (preset.method, preset.budget)), None)
            cost = [*_speed(found), f"{found['cached_tokens']:.0f}"] if found else ["[TinyViT](results/tinyvit.md)", "–", "–"]
            cells = [kind, f"`{name}`", f"[{preset.method}](methods/{preset.method}.md)", str(preset.budget)]
            lines.append(_row([*cells, _score(found, MEAN), _score(unpruned, MEAN), *cost, preset.why]))
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
        rows = _settings(published[presets.MEASURED_ON[kind]]) if presets.MEASURED_ON[kind] in published else []
        for name, preset in named.items():
            good = as_good(rows, preset)
            if rows and preset.method != (good or [None])[0]:
                what = f"vlprune/presets.py: {kind}, {name}: {preset.method} {preset.budget}"
                sys.stderr.write(f"{what}; as good as any, quickest first: {', '.join(good)}\n")


def _calibrated(results: dict[str, Any]) -> str:
    """Published settings beside calibrated ones, on questions that the search has not seen."""
    head = ["model", "method", "budget", "published settings", "calibrated", "difference of all samples", "p"]
    parts, lines = [], [_row(head), _row(["---", "---", *["---:"] * 5])]
    for model, result in results.items():
        parts.append(_conditions(result["run"]))
        for row in result["settings"]:
            change = row["difference"]
            value, low, high = (f"{100 * change[name]:+.1f}" for name in ("value", "low", "high"))
            scores = [_score(row[name], MEAN) for name in ("published", "calibrated")]
            p = "< 0.001" if change["p"] < 0.001 else f"{change['p']:.3f}"
            lines.append(_row([model, row["method"], str(row["budget"]), *scores, f"{value} ({low} to {high})", p]))
    return "\n\n".join([*parts, "\n".join(lines)])


# ------------------------------------------------------------------ cells


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _budget(row: Summary) -> str:
    return "–" if row["method"] == "none" else str(row["budget"])


def _tokens(row: Summary) -> list[str]:
    return [f"{row[key]:.0f}" for key in ("tokens", "layer_tokens", "cached_tokens")]


def _score(row: Summary | None, name: str) -> str:
    if row is None:
        return "–"
    number = row["numbers"][name]
    return f"{100 * number['value']:.1f} % ± {50 * (number['high'] - number['low']):.1f}"


def _speed(row: Summary) -> list[str]:
    return [f"{row['prefill_ms']:.1f} ms", f"{row['speedup']:.2f}x"]


def _fill(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the two marks of ``name``; the first time there is only one."""
    start, end = f"<!-- measured:{name} -->", f"<!-- end of measured:{name} -->"
    old = page.read_text()
    if start not in old:
        sys.exit(f"{page} has no place for its measurement: {start}")
    if end not in old:
        old = old.replace(start, f"{start}\n{end}")
    page.write_text(re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: f"{start}\n{text}\n{end}", old, flags=re.DOTALL))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
