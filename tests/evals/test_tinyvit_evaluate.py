"""``vlprune eval-vit``: what is measured stands in rows, and is not measured twice."""

from __future__ import annotations

import json

from typer.testing import CliRunner

import vlprune
from vlprune import cli, shell
from vlprune.evals.tinyvit import evaluate


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
        assert evaluate.method_of(evaluate.Setting(name, 0.5)).counts(196, 8)
