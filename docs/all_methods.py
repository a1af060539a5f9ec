"""The page that compares all methods, docs/results/all-methods.md, and tables of methods that were measured nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import dots
from cells import DOCS, MEAN, READING, Summary, budget_of, conditions, fill, name_of, score_of, table, tokens_of
from compared import AGAINST, BASELINES, CACHE, OWN, SHORTER, UNPRUNED, Results, budgets, find, known, parts, read
from PIL import Image

from vlprune.evals import plot

PAGE, PICTURE = "results/all-methods.md", "images/all-methods.png"
LEVEL = 0.05
"""Of significance, for all comparisons of a model together."""
BETTER, WORSE = "▲", "▼"
COLOURS = 128
"""Of a small picture."""
ENCODER = {"ClsAttention", "MeanAttention", "ReceivedAttention", "GlobalAttention"}
"""Signals of a vision encoder's attention."""
SORTS = (INSIDE, ATTENTION, FEATURES, LLM, EVICTS) = (
    "inside the vision encoder",
    "behind it, by its attention",
    "behind it, by features alone",
    "inside the LLM, or right before it",
    "cache alone",
)


def publish(measured: Iterable[str]) -> None:
    """Writes the page, its picture, and the tables of methods but for those that are ``measured`` elsewhere."""
    results = read()
    for block, text in blocks(results).items():
        fill(DOCS / PAGE, block, text)
    dots.figure(dots.panels(results)).savefig(DOCS / PICTURE, dpi=dots.DPI)
    for name in sorted({name for names in parts(results).values() for name in names} - set(measured)):
        fill(DOCS / "methods" / f"{name}.md", name, method(name, results))
        shown = [plot.Panel(_rows_of(name, model, results), MEAN, model) for model in _having(name, results)]
        _save(plot.figure(shown), DOCS / _picture(name))


def _save(figure: Any, path: Path) -> None:
    """As a picture of few colours, since there is one for each method."""
    figure.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE).save(path, optimize=True)


# ------------------------------------------------------------------ the page


def blocks(results: Results) -> dict[str, str]:
    """What the page has between its marks, by their names."""
    found = parts(results)
    return {
        "unpruned": _unpruned(results),
        "shorter": _compared(found[SHORTER], results),
        "cache": _compared(found[CACHE], results),
        "baselines": _compared(found[BASELINES], results),
        "by-content": _own(found[OWN], results),
        "kinds": _best(found, results),
        "sorts": _sorts(found, results),
        "impossible": _impossible(results),
        "how": "\n\n".join(conditions(result["run"]) for result in results.values()),
    }


def _unpruned(results: Results) -> str:
    rows = [[model, *_whole(result["settings"]), str(len(_tested(result)))] for model, result in results.items()]
    return table(["unpruned", "score", "visual tokens", "GFLOP", "KiB", "comparisons"], rows)


def _whole(rows: Sequence[Summary]) -> list[str]:
    (row,) = (row for row in rows if row["method"] == UNPRUNED)
    return [_cell(row), f"{row['visual_tokens']:.0f}", *_costs(row)]


def _tested(result: Summary) -> list[Summary]:
    return [row for row in result["settings"] if "over_random" in row]


def _compared(names: Sequence[str], results: Results) -> str:
    middle = budgets(results)[1]
    columns = [(model, budget) for model in results for budget in budgets(results)]
    head = ["method", "stages", *(f"{model}, {budget}" for model, budget in columns), "GFLOP", "KiB"]
    rows = []
    for name in names:
        at = [find(results, model, name, middle) for model in results]
        costs = ["<br>".join(pair) for pair in zip(*map(_costs, at), strict=True)]
        rows.append([_link(name), _stages(name), *(_cell(find(results, *m[:1], name, m[1])) for m in columns), *costs])
    return table(head, rows, left=2)


def _cell(row: Summary | None) -> str:
    if row is None:
        return "–"
    number = row["numbers"][MEAN]
    score = f"{100 * number['value']:.1f} ± {50 * (number['high'] - number['low']):.1f}"
    return f"{score}<br>{_over(row)}" if "over_random" in row else score


def _costs(row: Summary | None) -> list[str]:
    """GFLOP of the prefill, and KiB of the cache behind it."""
    return [f"{row['gflops']:.2f}", f"{row['cache_kib']:.0f}"] if row else ["–", "–"]


def _over(row: Summary) -> str:
    """The change from ``random``, with its mark."""
    change = row["over_random"]
    mark = "" if change["holm"] >= LEVEL else f" {BETTER}" if change["value"] > 0 else f" {WORSE}"
    return f"{100 * change['value']:+.1f}{mark}"


def _own(names: Sequence[str], results: Results) -> str:
    """Methods whose count the content decides: their score, and how much they kept."""
    head = ["method", "stages", *(f"{model}: {what}" for model in results for what in ("score", "tokens", "GFLOP", "KiB"))]
    rows = []
    for name in names:
        cells = []
        for model in results:
            row = find(results, model, name)
            cells += [_cell(row), f"{row['layer_tokens']:.0f}" if row else "–", *_costs(row)]
        rows.append([_link(name), _stages(name), *cells])
    return table(head, rows, left=2)


def _link(name: str, to: str = "../methods/") -> str:
    return f"[{name}]({to}{name}.md)"


def _stages(name: str) -> str:
    return ", ".join(f"`{stage}`" for stage in known()[name]["stages"]) or "–"


# ------------------------------------------------------------------ kinds of question


def _best(found: dict[str, list[str]], results: Results) -> str:
    """For each kind and budget the method of most right answers."""
    columns = [(model, budget) for model in results for budget in budgets(results)]
    rows = []
    for kind in _kinds(results):
        cells = [kind]
        for model, budget in columns:
            there = [row for name in found[SHORTER] + found[BASELINES] if (row := find(results, model, name, budget))]
            best = max(there, key=lambda row: row["categories"][kind])
            draw = find(results, model, AGAINST, budget)
            beside = f" ({100 * draw['categories'][kind]:.0f})" if draw else ""
            cells.append(f"{name_of(best)} {100 * best['categories'][kind]:.0f}{beside}")
        rows.append(cells)
    return table(["kind", *(f"{model}, {budget}" for model, budget in columns)], rows, left=len(columns) + 1)


def _sorts(found: dict[str, list[str]], results: Results) -> str:
    """For each sort of method the median score of each kind at the middle budget, the models side by side."""
    middle, kinds = budgets(results)[1], _kinds(results)
    sorts = {sort: [name for name in found[SHORTER] + found[CACHE] if sort_of(name) == sort] for sort in SORTS}
    groups = sorts | {name: [name] for name in found[BASELINES]} | {UNPRUNED: [UNPRUNED]}
    rows = []
    for title, names in groups.items():
        at = [
            [row for name in names if (row := find(results, model, name, None if name == UNPRUNED else middle))]
            for model in results
        ]
        cells = [" / ".join(_median(rows, kind) for rows in at) for kind in kinds]
        rows.append([title, " / ".join(str(len(rows)) for rows in at), *cells])
    return table(["sort", "methods", *kinds], rows)


def _median(rows: Sequence[Summary], kind: str) -> str:
    return f"{100 * median(row['categories'][kind] for row in rows):.0f}" if rows else "–"


def sort_of(name: str) -> str:
    """Where a method works, and by what it chooses there."""
    stages, needs = known()[name]["stages"], set(known()[name]["needs"])
    if "encode" in stages:
        return INSIDE
    if "select" in stages:
        return ATTENTION if needs & ENCODER else FEATURES
    return EVICTS if stages == ["evict"] else LLM


def _kinds(results: Results) -> list[str]:
    return list(next(iter(results.values()))["settings"][0]["categories"])


# ------------------------------------------------------------------ what was not possible


def _impossible(results: Results) -> str:
    """Settings and why, those of a method in one row; methods that had nothing to do."""
    reasons: dict[str, dict[str, dict[str, list[str]]]] = {}
    for model, result in results.items():
        for label, why in result["not_possible"].items():
            method, _, budget = label.rpartition(" ")
            reasons.setdefault(method.partition("[")[0], {}).setdefault(model, {}).setdefault(_reason(why), []).append(budget)
    shown = {name for names in parts(results).values() for name in names}
    for model, result in results.items():
        for name in {name_of(row) for row in result["settings"]} - {UNPRUNED, *shown}:
            reasons.setdefault(name, {})[model] = {"images stay whole: it is for videos": ["all"]}
    rows = [[_link(name), *(_told(models.get(model, {})) for model in results)] for name, models in sorted(reasons.items())]
    return table(["method", *results], rows, left=1 + len(results)) if rows else "Nothing."


def _told(reasons: dict[str, list[str]]) -> str:
    return "<br>".join(f"{', '.join(budgets)}: {why}" for why, budgets in reasons.items())


def _reason(why: str) -> str:
    """Of a budget that is too small only from where on it is possible; other reasons as they were told."""
    told = " ".join(why.split())
    lowest = re.search(r"or a fraction of ([\d.]+) to 1", told)
    return f"possible from {lowest[1]} on" if lowest else told.partition(": ")[0]


# ------------------------------------------------------------------ a method's page


def method(name: str, results: Results) -> str:
    """A table for each model, and the curve beside the baseline's."""
    having = _having(name, results)
    blocks = [f"{conditions(results[model]['run'])}\n\n{_own_table(name, model, results)}" for model in having]
    lacking = [model for model in results if model not in having]
    return "\n\n".join(
        [
            *blocks,
            "Visual tokens of an image that enter the LLM, as a mean over its layers, and left in the cache after the prompt. "
            f"Over {AGAINST}: points of all questions; {BETTER} and {WORSE} as [there](../{PAGE}). Times were not taken.",
            *([f"Not possible at these budgets: {', '.join(lacking)}."] if lacking else []),
            f"![{name}: accuracy against visual tokens](../{_picture(name)})",
            f"All methods in one table and picture: [all methods](../{PAGE}).",
        ]
    )


def _own_table(name: str, model: str, results: Results) -> str:
    head = ["method", "budget", "enter", "layers", "cache", "mean accuracy", READING, f"over {AGAINST}", "GFLOP", "cache, KiB"]
    rows = []
    for row in _rows_of(name, model, results):
        over = _over(row) if "over_random" in row and name_of(row) == name else "–"
        scores = [score_of(row, MEAN), score_of(row, READING)]
        rows.append([name_of(row), budget_of(row), *tokens_of(row), *scores, over, *_costs(row)])
    return table(head, rows)


def _rows_of(name: str, model: str, results: Results) -> list[Summary]:
    """The unpruned model, the method, and the baseline that is drawn beside."""
    settings = results[model]["settings"]
    beside = [AGAINST] if name != AGAINST else []
    return [row for one in (UNPRUNED, name, *beside) for row in settings if name_of(row) == one]


def _having(name: str, results: Results) -> list[str]:
    return [model for model in results if find(results, model, name)]


def _picture(name: str) -> str:
    return f"images/methods/{name}.png"
