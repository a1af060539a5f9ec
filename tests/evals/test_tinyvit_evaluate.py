"""``vlprune eval-vit``: what is measured stands in rows, and is not measured twice."""

from __future__ import annotations

import json
from functools import partial

import torch
from typer.testing import CliRunner

import vlprune
from vlprune import cli, shell
from vlprune.calibrate import tinyvit
from vlprune.calibrate.images import SynthVQA
from vlprune.evals.tinyvit import evaluate, load_tinyvit


def test_rows_table_and_picture_and_a_second_run_goes_on(tmp_path):
    out = tmp_path / "run"

    def invoke(methods: str, budgets: str = "0.5,0.05"):
        options = ["--samples", "6", "--out", str(out)]
        arguments = ["eval-vit", "--methods", methods, "--budgets", budgets, *options]
        return CliRunner().invoke(shell.application(cli.COMMANDS), arguments, prog_name="vlprune")

    assert invoke("none,tome").exit_code == 0
    before = (out / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [(row["method"], row["budget"]) for row in rows] == [("none", 1.0), ("tome", 0.5), ("tome", 0.05)]
    whole, half, none = rows
    assert (whole["share"], half["share"]) == (1.0, 0.5)
    assert whole["accuracy"] >= 4 / 6
    assert {"images_per_s", "speedup", "device", "versions", "commit", "command", "weights"} <= half.keys()
    assert "half of its rows" in none["error"]
    result = invoke("none,tome,random-patches", "0.5")
    assert "tome" not in result.output
    after = (out / "rows.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 4
    text = (out / "table.md").read_text()
    assert "| tome | 0.5 | 50.0 % |" in text
    assert "| random-patches | 0.5 | 50.0 % |" in text
    assert (out / "accuracy.png").stat().st_size > 10_000
    assert invoke("hirred").exit_code == 2


def test_by_default_everything_is_measured_that_can_be():
    named = evaluate.default_methods().split(",")
    assert named[0] == "none"
    learned = {name for name, cls in vlprune.methods("vit").items() if hasattr(cls, "heads")}
    assert set(named) >= set(vlprune.methods("vit")) - learned
    for name in set(named) & learned:
        given = evaluate.method_of(evaluate.Setting(f"{name}[heads=tinyvit-{name}]", 0.5))
        assert given == evaluate.method_of(evaluate.Setting(name, 0.5))
        assert given.counts(196, 8)
    calibrated = [setting for setting in evaluate.parse(",".join(named), "0.5") if "config" in setting.method]
    for setting in calibrated:
        assert sum(evaluate.method_of(setting).counts(196, 8)) <= setting.budget * 196 * 8


def test_what_comes_along_for_tinyvit_is_made_by_a_script(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyvit, "SynthVQA", partial(SynthVQA, batch_size=2))
    monkeypatch.setattr(tinyvit, "JUDGED", SynthVQA(count=2, batch_size=2, first=8_000_000))
    tinyvit.main(tmp_path, "vtm,diffrate", steps=1)
    heads = tmp_path / "tinyvit-vtm.safetensors"
    counts = {budget: tmp_path / f"{name}.json" for budget, name in tinyvit.COUNTS.items()}
    assert set(tmp_path.iterdir()) == {heads, *counts.values()}
    model, pixels = load_tinyvit(), torch.zeros(1, 3, 112, 112)
    for budget, config in counts.items():
        for options in ({"config": config}, {"method": "vtm", "heads": heads}):
            vlprune.apply(model, **options, budget=budget)
            model(pixels)
            assert 0.9 * budget < vlprune.report(model).layer_mean / 196 <= budget
