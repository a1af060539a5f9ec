"""The page of all methods, made from results that were made up: what stands where, in what order, and with which mark."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BUDGETS = (0.33, 0.22, 0.11)
TOTAL = 100


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS)
    import all_methods

    return all_methods


def setting(method: str, budget: float, score: float, layers: float, cached: float, **more: Any) -> dict[str, Any]:
    number = {"value": score, "low": score - 0.05, "high": score + 0.05, "maximum": 1.0}
    amounts = {"tokens": layers, "layer_tokens": layers, "cached_tokens": cached, "visual_tokens": TOTAL}
    numbers = {"mean over kinds": number, "text, form, chart": number}
    costs = {"gflops": layers / 100, "cache_kib": cached}
    return {"method": method, "budget": budget, "numbers": numbers, "categories": {"text": score}, **amounts, **costs, **more}


def spent(method: str, scores: dict[float, float], whole: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Settings that keep what their budget says; ``whole``: in the cache alone."""
    return [
        setting(method, budget, score, TOTAL if whole else TOTAL * budget, TOTAL * budget, **more)
        for budget, score in scores.items()
    ]


def result(name: str, rows: list[dict[str, Any]], **impossible: str) -> dict[str, Any]:
    data = {"version": "made up", "samples": 10}
    run = {"model": {"name": name}, "versions": {}, "hardware": {"device": "none"}, "commit": "0", "command": "vlprune eval"}
    basis = [setting("none", 1.0, 0.9, TOTAL, TOTAL), *spent("random", dict(zip(BUDGETS, (0.5, 0.4, 0.3), strict=True)))]
    return {"run": {**run, "benchmarks": {"synthvqa": data}}, "not_possible": impossible, "settings": basis + rows}


def both(first: list[dict[str, Any]], second: list[dict[str, Any]], **impossible: str) -> dict[str, Any]:
    return {"A": result("A", first, **impossible), "B": result("B", second)}


def lines(text: str) -> list[list[str]]:
    """Cells of a table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_methods_stand_by_their_mean_at_the_middle_budget(pages: ModuleType):
    """And one that a model cannot have there stands behind those that both have, however good it is."""
    first = spent("hired", {0.33: 0.1, 0.22: 0.5}) + spent("divprune", {0.22: 0.8}) + spent("dart", {0.22: 0.95})
    second = spent("hired", {0.33: 0.1, 0.22: 0.9}) + spent("divprune", {0.22: 0.5}) + spent("dart", {0.33: 0.95})
    made = lines(pages.blocks(both(first, second))["shorter"])
    assert [row[0] for row in made] == [f"[{name}](../methods/{name}.md)" for name in ("hired", "divprune", "dart")]
    assert made[0][2:8] == ["10.0 ± 5.0", "50.0 ± 5.0", "–", "10.0 ± 5.0", "90.0 ± 5.0", "–"]
    assert made[2][-2:] == ["0.22<br>–", "22<br>–"]


def test_what_is_saved_decides_on_the_part(pages: ModuleType):
    """A smaller cache alone, a count that heeds no budget, nothing at all."""
    own = [setting("zipvl", budget, 0.8, 70, 70) for budget in BUDGETS]
    idle = [setting("evs", budget, 0.9, TOTAL, TOTAL) for budget in BUDGETS]
    rows = spent("snapkv", {0.22: 0.85}, whole=True) + own + idle + spent("hired", {0.22: 0.7})
    made = pages.blocks(both(rows, [], **{"fastv 0.22": "fastv allows 9 to 9, or a fraction of 0.402 to 1; raise"}))
    there = {part: [row[0].partition("]")[0][1:] for row in lines(made[part])] for part in ("shorter", "cache", "baselines")}
    assert there == {"shorter": ["hired"], "cache": ["snapkv"], "baselines": ["random"]}
    assert lines(made["by-content"])[0][2:] == ["80.0 ± 5.0", "70", "0.70", "70", "–", "–", "–", "–"]
    assert [row[1:] for row in lines(made["impossible"])] == [
        ["all: images stay whole: it is for videos", ""],
        ["0.22: possible from 0.402 on", ""],
    ]


def test_marks_are_of_corrected_tests(pages: ModuleType):
    def over(value: float, corrected: float) -> dict[str, float]:
        return {"value": value, "low": value, "high": value, "p": 0.001, "holm": corrected}

    rows = spent("hired", {0.33: 0.6}, over_random=over(0.1, 0.01)) + spent("hired", {0.22: 0.5}, over_random=over(0.1, 0.06))
    rows += spent("hired", {0.11: 0.2}, over_random=over(-0.1, 0.04))
    (made,) = lines(pages.blocks(both(rows, []))["shorter"])
    assert [cell.partition("<br>")[2] for cell in made[2:5]] == ["+10.0 ▲", "+10.0", "-10.0 ▼"]


def test_the_best_of_a_kind_stands_beside_the_draw(pages: ModuleType):
    """What leaves the prefill whole does not count; a baseline does."""
    rows = spent("snapkv", {0.22: 0.95}, whole=True) + spent("hired", {0.22: 0.35, 0.33: 0.7})
    (made,) = lines(pages.blocks(both(rows, []))["kinds"])
    assert made == ["text", "hired 70 (50)", "random 40 (40)", "random 30 (30)", *(f"random {x} ({x})" for x in (50, 40, 30))]
