"""Rows become the right numbers, on any terminal, and a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vlprune.evals import plot, report
from vlprune.evals.metrics import METRIC_OF_KIND
from vlprune.evals.runner import Row
from vlprune.evals.settings import BUDGETS, METHODS, parse

MANIFEST = {
    "model": {"name": "TinyVLM", "sha256": "a" * 64, "dtype": "float32"},
    "data": {"name": "SynthVQA 1", "samples": 24, "sha256": "b" * 64},
    "generation": {"batch_size": 8},
    "versions": {"vlprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": {"device": "A processor", "cores": 2, "threads": 2},
    "date": "2026-01-02",
    "commit": "0123abc",
    "command": "vlprune eval --samples 24",
}


def row(method: str, budget: float, number: int, **changes: Any) -> Row:
    """A right answer in batches of eight; every kind in turn."""
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
        "selection_seconds": None if method == "none" else 0.008,
        "prefill_seconds": 0.8 * budget,
        "decode_seconds_per_token": 0.01,
        "steps": 3,
    }
    told = {"method": method, "budget": budget, "batch": number // 8, "id": f"test-{number}", "kind": kind, "error": None}
    return told | {"answers": [answer] * (10 if kind == "text" else 1), "prediction": answer} | measured | changes


def failed(row: Row) -> Row:
    kept = ("method", "budget", "batch", "id", "kind", "answers")
    return {key: row[key] for key in kept} | {"prediction": None, "error": "ValueError: no"}


@pytest.fixture
def rows() -> list[Row]:
    unpruned = [row("none", 1.0, n) for n in range(24)]
    return unpruned + [row("hired", budget, n) for budget in (0.5, 0.25) for n in range(24)]


def test_summary(rows: list[Row]):
    none, half, quarter = report.summarise(rows)
    assert (none["method"], none["budget"], none["samples"], none["errors"]) == ("none", 1.0, 24, 0)
    assert none["mean"] == {"value": 1.0, "low": pytest.approx(5 / 6), "high": 1.0}
    assert (half["tokens"], half["layer_tokens"], half["cached_tokens"], half["visual_tokens"]) == (168, 252, 150, 336)
    assert (none["prefill_ms"], half["prefill_ms"]) == (pytest.approx(100), pytest.approx(50))
    assert (none["speedup"], quarter["speedup"]) == (1.0, pytest.approx(4.0))
    assert (none["selection_ms"], half["selection_ms"]) == (None, pytest.approx(1.0))
    assert (half["decode_ms"], half["gflops"], half["cache_kib"]) == (pytest.approx(10), pytest.approx(1), pytest.approx(1))
    assert half["agreement"] == 1.0
    assert {kind: value["metric"] for kind, value in half["kinds"].items()} == {k: m.name for k, m in METRIC_OF_KIND.items()}


def test_wrong_answers_count_in_kind_mean_and_agreement(rows: list[Row]):
    for index in range(24, 48):
        if rows[index]["kind"] == "chart":
            rows[index]["prediction"] = "no idea"
    _, half, quarter = report.summarise(rows)
    assert half["kinds"]["chart"]["value"] == 0.0
    assert half["mean"]["value"] == pytest.approx(5 / 6)
    assert half["reading"]["value"] == pytest.approx(2 / 3)
    assert half["agreement"] == pytest.approx(20 / 24)
    assert quarter["mean"]["value"] == 1.0


def test_presence_is_an_f1(rows: list[Row]):
    for index in range(24, 48):
        if rows[index]["kind"] == "presence":
            rows[index]["prediction"] = "yes"
    _, half, _ = report.summarise(rows)
    labels = [r["answers"][0] for r in rows[24:48] if r["kind"] == "presence"]
    yes = labels.count("yes")
    assert half["kinds"]["presence"]["value"] == pytest.approx(2 * yes / (len(labels) + yes))
    assert half["pope"]["yes_ratio"] == 1.0


def test_failed_samples_are_wrong_and_not_timed(rows: list[Row]):
    rows[24] = failed(rows[24])
    for index in range(25, 32):
        rows[index] |= {"batch_size": 1, "prefill_seconds": 9.0}
    _, half, _ = report.summarise(rows)
    assert half["errors"] == 1
    assert half["kinds"]["text"]["value"] == 0.75
    assert half["prefill_ms"] == pytest.approx(50)
    assert half["agreement"] == pytest.approx(23 / 24)


def test_nothing_but_failures(rows: list[Row]):
    summaries = report.summarise([failed(row) for row in rows])
    assert summaries[1]["mean"]["value"] == 0.0
    assert summaries[1]["tokens"] is summaries[1]["prefill_ms"] is summaries[1]["agreement"] is None
    assert "–" in report.markdown(summaries, MANIFEST)


def test_without_unpruned(rows: list[Row]):
    half, _ = report.summarise(rows[24:])
    assert (half["agreement"], half["speedup"]) == (None, None)


def test_a_last_small_batch_is_not_timed(rows: list[Row]):
    rest = [row("none", 1.0, n, batch=3, batch_size=2, prefill_seconds=50.0) for n in (24, 25)]
    assert report.summarise(rows[:24] + rest)[0]["prefill_ms"] == pytest.approx(100)


@pytest.mark.parametrize("width", [200, 120, 119, 112, 100, 89, 80, 70])
def test_table_is_whole_at_any_width(rows: list[Row], width: int):
    text = io.StringIO()
    report.print_table(report.summarise(rows), Console(file=text, width=width))
    printed = text.getvalue()
    assert "…" not in printed
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width
    for word in ("hired", "0.25", "enter", "layers", "cache", "pres.", "100.0", "agree", "prefill", "KiB", "±"):
        assert word in printed


def test_default_methods_fit_into_120_columns():
    """With the largest numbers that there may be."""
    settings = parse(METHODS, BUDGETS)
    large = {"prefill_seconds": 1.0, "decode_seconds_per_token": 0.1, "cache_bytes": 2162 * 1024, "flops": 2.1e9}
    text = io.StringIO()
    rows = [row(setting.method, setting.budget, n, **large) for setting in settings for n in range(24)]
    report.print_table(report.summarise(rows), Console(file=text, width=120))
    assert sum(line.startswith("mustdrop") for line in text.getvalue().splitlines()) == 3
    assert "…" not in text.getvalue()


def test_options_are_no_markup(rows: list[Row]):
    text = io.StringIO()
    report.print_table(report.summarise([r | {"method": "fastv[layer=1]"} for r in rows[24:]]), Console(file=text, width=140))
    assert "fastv[layer=1]" in text.getvalue()


def test_files(rows: list[Row], tmp_path: Path):
    summaries = report.summarise(rows)
    paths = report.write(summaries, MANIFEST, tmp_path)
    assert [path.name for path in paths] == ["summary.json", "table.md"]
    assert json.loads(paths[0].read_text()) == {"run": MANIFEST, "settings": summaries}
    table = paths[1].read_text()
    for told in ("A processor", "torch 2.13.0", "0123abc", "`vlprune eval --samples 24`", "2026-01-02", "aaaaaaaaaaaa"):
        assert told in table
    assert sum(line.startswith("| hired") for line in table.splitlines()) == 2


def test_picture(rows: list[Row], tmp_path: Path):
    path = plot.draw(report.summarise(rows), tmp_path, "TinyVLM")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20


def test_a_method_that_only_evicts_is_drawn_by_its_cache(rows: list[Row]):
    evicting = [r | {"method": "snapkv", "layer_tokens": 336} for r in rows[24:]]
    figure = plot.figure(report.summarise(rows + evicting))
    lines: dict[Any, Any] = {line.get_label(): list(np.asarray(line.get_xdata())) for line in figure.axes[0].lines}
    assert lines["hired"] == [210, 252]
    assert lines["snapkv (tokens in the cache)"] == [75, 150]


@pytest.mark.parametrize("kept", [slice(0, 24), slice(24, None), slice(0, 2)])
def test_picture_of_part_of_a_run(rows: list[Row], tmp_path: Path, kept: slice):
    assert plot.draw(report.summarise(rows[kept]), tmp_path).exists()
