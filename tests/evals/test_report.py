"""Rows become the right numbers, on any terminal, and a picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vlprune.evals import benchmarks, outputs, plot, report, tables
from vlprune.evals.answering import TIMES
from vlprune.evals.journal import Row
from vlprune.evals.metrics import METRIC_OF_KIND
from vlprune.evals.report import Run, Summary
from vlprune.evals.settings import BUDGETS, METHODS, parse

MANIFEST = {
    "model": {"name": "TinyVLM", "sha256": "a" * 64, "dtype": "float32"},
    "benchmarks": {
        "synthvqa": {"name": "synthvqa", "title": "SynthVQA", "version": "SynthVQA 1", "samples": 24, "options": {}},
    },
    "generation": {"batch_size": 8},
    "versions": {"vlprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": {"device": "A processor", "cores": 2, "threads": 2},
    "date": "2026-01-02",
    "commit": "0123abc",
    "command": "vlprune eval --samples 24",
}
SYNTHVQA = benchmarks.find("synthvqa")
MEAN, READING = "mean over kinds", "text, form, chart"


def row(method: str, budget: float, number: int, **changes: Any) -> Row:
    """A right answer in batches of eight; every kind in turn. ``changes`` may be of the times as well."""
    kind = list(METRIC_OF_KIND)[number % 6]
    answer = {"presence": "yes" if number % 12 == 3 else "no"}.get(kind, "K7P")
    measured = {
        "tokens": 336 * budget,
        "layer_tokens": 336 * (1 + budget) / 2,
        "cached_tokens": 300 * budget,
        "visual_tokens": 336,
        "batch_size": 8,
        "flops": 2e9 * budget,
        "cache_bytes": 2048 * budget,
        "steps": 3,
    }
    times = {
        "selection_seconds": None if method == "none" else 0.008,
        "prefill_seconds": 0.8 * budget,
        "decode_seconds_per_token": 0.01,
    }
    times |= {key: changes.pop(key) for key in times if key in changes}
    told = {"benchmark": "synthvqa", "method": method, "budget": budget, "batch": number // 8, "id": f"test-{number}"}
    told |= {"category": kind, "answers": [answer] * (10 if kind == "text" else 1), "prediction": answer, "score": 1.0}
    return told | {"error": None, TIMES: times} | measured | changes


def says(row: Row, prediction: str | None) -> None:
    """Puts another answer into a row."""
    row |= {"prediction": prediction, "score": SYNTHVQA.score(row, prediction)}


def failed(row: Row) -> Row:
    kept = ("benchmark", "method", "budget", "batch", "id", "category", "answers")
    return {key: row[key] for key in kept} | {"prediction": None, "score": 0.0, "error": "ValueError: no"}


def summarise(rows: list[Row]) -> list[Summary]:
    return report.summarise(rows, SYNTHVQA)


@pytest.fixture
def rows() -> list[Row]:
    unpruned = [row("none", 1.0, n) for n in range(24)]
    return unpruned + [row("hired", budget, n) for budget in (0.5, 0.25) for n in range(24)]


def test_summary(rows: list[Row]):
    none, half, quarter = summarise(rows)
    assert (none["method"], none["budget"], none["samples"], none["errors"]) == ("none", 1.0, 24, 0)
    assert none["headline"] == MEAN
    assert none["score"] == {"value": 1.0, "low": pytest.approx(5 / 6), "high": 1.0, "samples": 24, "maximum": 1.0}
    assert (half["tokens"], half["layer_tokens"], half["cached_tokens"], half["visual_tokens"]) == (168, 252, 150, 336)
    assert (none["prefill_ms"], half["prefill_ms"]) == (pytest.approx(100), pytest.approx(50))
    assert (none["speedup"], quarter["speedup"]) == (1.0, pytest.approx(4.0))
    assert (none["selection_ms"], half["selection_ms"]) == (None, pytest.approx(1.0))
    assert (half["decode_ms"], half["gflops"], half["cache_kib"]) == (pytest.approx(10), pytest.approx(1), pytest.approx(1))
    assert half["agreement"] == 1.0
    assert list(half["categories"]) == list(METRIC_OF_KIND)
    assert (none["difference"], half["difference"]["value"], half["difference"]["p"]) == (None, 0.0, 1.0)


def test_wrong_answers_count_everywhere(rows: list[Row]):
    for index in range(24, 48):
        if rows[index]["category"] == "chart":
            says(rows[index], "no idea")
    _, half, quarter = summarise(rows)
    assert half["categories"]["chart"]["value"] == 0.0
    assert half["score"]["value"] == half["numbers"][MEAN]["value"] == pytest.approx(5 / 6)
    assert half["numbers"][READING]["value"] == pytest.approx(2 / 3)
    assert half["agreement"] == pytest.approx(20 / 24)
    assert half["difference"]["value"] == pytest.approx(-4 / 24)
    assert half["difference"]["p"] == pytest.approx(2 / 2**4)
    assert quarter["score"]["value"] == 1.0


def test_presence_is_an_f1(rows: list[Row]):
    presence = [r for r in rows[24:48] if r["category"] == "presence"]
    for one in presence:
        says(one, "yes")
    _, half, _ = summarise(rows)
    yes = sum(r["answers"][0] == "yes" for r in presence)
    assert half["categories"]["presence"]["value"] == pytest.approx(2 * yes / (len(presence) + yes))


def test_what_is_left_where_a_smaller_image_fails(rows: list[Row]):
    """Of six questions that the smaller image gets wrong, the method gets four right; other budgets have no such baseline."""
    smaller = [r | {"method": "resize"} for r in rows[24:48]]
    for number in range(6):
        says(smaller[number], "no idea")
    for number in (24, 25, 40):
        says(rows[number], "no idea")
    none, half, quarter, resize = summarise(rows + smaller)
    assert half["small_image_fails"]["samples"] == 6
    assert half["small_image_fails"]["value"] == pytest.approx(4 / 6)
    assert resize["small_image_fails"]["value"] == 0.0
    assert none["small_image_fails"] is quarter["small_image_fails"] is None


def test_only_samples_that_both_have_are_compared(rows: list[Row]):
    """As while a run is under way."""
    _, half = summarise(rows[:20] + rows[24:30])
    assert (half["samples"], half["difference"]["samples"]) == (6, 6)


def test_failed_samples_are_wrong_and_not_timed(rows: list[Row]):
    rows[24] = failed(rows[24])
    for index in range(25, 32):
        rows[index] |= {"batch_size": 1, TIMES: rows[index][TIMES] | {"prefill_seconds": 9.0}}
    _, half, _ = summarise(rows)
    assert half["errors"] == 1
    assert half["categories"]["text"]["value"] == 0.75
    assert half["prefill_ms"] == pytest.approx(50)
    assert half["agreement"] == pytest.approx(23 / 24)


def test_nothing_but_failures(rows: list[Row]):
    summaries = summarise([failed(row) for row in rows])
    assert summaries[1]["score"]["value"] == 0.0
    assert summaries[1]["tokens"] is summaries[1]["prefill_ms"] is summaries[1]["agreement"] is None
    assert "–" in tables.markdown({"synthvqa": summaries}, MANIFEST)


def test_without_unpruned(rows: list[Row]):
    half, _ = summarise(rows[24:])
    assert (half["agreement"], half["speedup"], half["difference"]) == (None, None, None)


def test_a_last_small_batch_is_not_timed(rows: list[Row]):
    rest = [row("none", 1.0, n, batch=3, batch_size=2, prefill_seconds=50.0) for n in (24, 25)]
    assert summarise(rows[:24] + rest)[0]["prefill_ms"] == pytest.approx(100)


@pytest.mark.parametrize("width", [200, 120, 119, 112, 100, 89, 80, 70])
def test_table_is_whole_at_any_width(rows: list[Row], width: int):
    text = io.StringIO()
    tables.print_table(summarise(rows), Console(file=text, width=width))
    printed = text.getvalue()
    assert "…" not in printed
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width
    for word in ("hired", "0.25", "enter", "layers", "cache", "pres.", "100.0", "agree", "Δ", "prefill", "KiB", "±"):
        assert word in printed


def test_default_methods_fit_into_120_columns():
    """With the largest numbers that there may be."""
    settings = parse(METHODS, BUDGETS)
    large = {"prefill_seconds": 1.0, "decode_seconds_per_token": 0.1, "cache_bytes": 2162 * 1024, "flops": 2.1e9}
    text = io.StringIO()
    rows = [row(setting.method, setting.budget, n, **large) for setting in settings for n in range(24)]
    for one in rows[24:]:
        if one["category"] in ("text", "form"):
            says(one, "no idea")
    tables.print_table(summarise(rows), Console(file=text, width=120))
    assert "-33.3*" in text.getvalue()
    assert sum(line.startswith("mustdrop") for line in text.getvalue().splitlines()) == 3
    assert "…" not in text.getvalue()


def test_options_are_no_markup(rows: list[Row]):
    text = io.StringIO()
    tables.print_table(summarise([r | {"method": "fastv[layer=1]"} for r in rows[24:]]), Console(file=text, width=140))
    assert "fastv[layer=1]" in text.getvalue()


def run_of(rows: list[Row], out: Path) -> Run:
    return Run(out, MANIFEST, {"synthvqa": rows} if rows else {})


def test_files(rows: list[Row], tmp_path: Path):
    run = run_of(rows, tmp_path)
    summaries = run.summaries()
    paths = outputs.write(run, summaries)
    assert [path.name for path in paths] == ["summary.json", "table.md", "table.csv", "accuracy.png", "time.png"]
    written = json.loads(paths[0].read_text())
    assert written["run"] == MANIFEST
    assert written["benchmarks"]["synthvqa"]["settings"] == summaries["synthvqa"]
    table = paths[1].read_text()
    for told in ("A processor", "torch 2.13.0", "0123abc", "`vlprune eval --samples 24`", "2026-01-02", "aaaaaaaaaaaa"):
        assert told in table
    assert sum(line.startswith("| hired") for line in table.splitlines()) == 2
    lines = list(csv.DictReader(io.StringIO(paths[2].read_text())))
    assert [(line["model"], line["method"], line["budget"]) for line in lines][1] == ("TinyVLM", "hired", "0.5")
    assert float(lines[1]["category chart"]) == summaries["synthvqa"][1]["categories"]["chart"]["value"]


def test_several_runs_share_a_table_and_a_picture(rows: list[Row], tmp_path: Path):
    paths = outputs.write_together([run_of(rows, tmp_path), run_of(rows[:24], tmp_path)], tmp_path / "both")
    assert [path.name for path in paths] == ["table.md", "table.csv", "accuracy.png", "time.png"]
    assert len(list(csv.DictReader(paths[1].open()))) == 3 + 1


def test_several_benchmarks_have_an_overview(rows: list[Row]):
    """What is left of the unpruned score, as a mean over benchmarks: papers print that."""
    other = [dict(r) for r in rows]
    for number in range(24, 48):
        says(other[number], None)
    both = {"one": summarise(rows), "two": summarise(other)}
    none, half, _ = report.overview(both)
    assert (none["relative"], half["relative"]) == (1.0, 0.5)
    assert {name: score["value"] for name, score in half["scores"].items()} == {"one": 1.0, "two": 0.0}
    text = io.StringIO()
    tables.print_overview(both, Console(file=text, width=100))
    assert "% of unpruned" in text.getvalue()


@pytest.mark.parametrize("name", [plot.ACCURACY, plot.TIME])
def test_picture(rows: list[Row], tmp_path: Path, name: str):
    plot.draw(plot.panels_of({"synthvqa": summarise(rows)}), tmp_path, "TinyVLM")
    with Image.open(tmp_path / name) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20


def test_a_method_that_only_evicts_is_drawn_by_its_cache(rows: list[Row]):
    evicting = [r | {"method": "snapkv", "layer_tokens": 336} for r in rows[24:]]
    figure = plot.figure(plot.panels_of({"synthvqa": summarise(rows + evicting)}))
    lines: dict[Any, Any] = {line.get_label(): list(np.asarray(line.get_xdata())) for line in figure.axes[0].lines}
    assert lines["hired"] == [210, 252]
    assert lines["snapkv (tokens in the cache)"] == [75, 150]


def test_pareto_front():
    points = [(4.0, 90.0), (1.0, 50.0), (2.0, 40.0), (3.0, 80.0), (3.0, 70.0), (5.0, 90.0)]
    assert plot.pareto(points) == [(1.0, 50.0), (3.0, 80.0), (4.0, 90.0)]


@pytest.mark.parametrize("kept", [slice(0, 24), slice(24, None), slice(0, 2), slice(0, 0)])
def test_part_of_a_run(rows: list[Row], tmp_path: Path, kept: slice):
    run = run_of(rows[kept], tmp_path)
    assert all(path.exists() for path in outputs.write(run, run.summaries()))
