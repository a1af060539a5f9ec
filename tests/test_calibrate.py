"""The search for a method's knobs: finds the best of its trials, holds the budget, and can be cut off at any time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vlprune
from tests import zoo
from vlprune import calibrate, cli, shell
from vlprune.calibrate.search import Search
from vlprune.calibrate.states import answered, distance
from vlprune.engine.patch import patch_of

APP = shell.application(cli.COMMANDS)


@pytest.fixture(scope="module")
def model() -> Any:
    built = zoo.build("llava_next")
    built.generation_config.suppress_tokens = [zoo.IMAGE, zoo.VIDEO]
    return built


@pytest.fixture(scope="module")
def batches() -> list[Any]:
    return [zoo.prompt("llava_next", images=(1, 1), words=(3, 5), seed=seed) for seed in range(2)]


def search(model: Any, batches: list[Any], out: Any, **options: Any) -> Any:
    settings = {"budget": 0.3, "trials": 12, "answer_tokens": 2} | options
    return calibrate.knobs(model, batches, "hired", out, **settings)


def test_the_best_of_the_trials_is_written_and_loses_what_the_file_says(model, batches, tmp_path):
    out = tmp_path / "found" / "hired.json"
    found = search(model, batches, out, notes={"data": "two batches"})
    told = json.loads(out.read_text())
    assert found.trials == told["calibrated"]["trials"] == 12
    assert found.loss < found.default
    assert (told["calibrated"]["data"], told["calibrated"]["budget"]) == ("two batches", 0.3)
    assert patch_of(model) is None
    vlprune.apply(model, config=out)
    assert patch_of(model).method == found.method
    vlprune.remove(model)
    whole = [answered(model, one, 2) for one in batches]
    for method, loss in ((found.method, found.loss), (vlprune.HiRED(budget=0.3), found.default)):
        assert torch.cat([distance(model, method, one) for one in whole]).mean().item() == pytest.approx(loss, rel=1e-4)


def test_cut_off_it_keeps_what_it_found_and_goes_on(model, batches, tmp_path):
    out, seen = tmp_path / "hired.json", []

    def cut(found):
        seen.append(found)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, batches, out, progress=cut)
    kept = json.loads(out.read_text())
    assert kept["settings"] == seen[-1].method.to_dict()
    assert patch_of(model) is None
    more = []
    found = search(model, batches, out, trials=7, progress=more.append)
    assert [state.trials for state in more] == [5, 6, 7]
    assert found.loss <= kept["calibrated"]["loss"]
    assert search(model, batches, out, trials=7, progress=more.append).method == found.method
    assert len(more) == 3
    other = zoo.build("llava_next", seed=5)
    other.generation_config.suppress_tokens = [zoo.IMAGE, zoo.VIDEO]
    with pytest.raises(vlprune.VLPruneError, match="others under the same name"):
        search(other, batches, out, trials=8)
    # Another budget is another search, in the same journal.
    assert search(model, batches, out, budget=0.2, trials=1).trials == 1


def test_where_no_trial_is_better_the_defaults_are_written(model, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(
        vlprune.HiRED, "knobs", classmethod(lambda cls, draw, shape: {"alpha": draw.number("alpha", 0.5, 0.5)})
    )
    found = search(model, batches, tmp_path / "hired.json", trials=2)
    assert found.method == vlprune.HiRED(budget=0.3)
    assert found.loss == found.default


def test_trials_over_the_budget_or_out_of_range_do_not_count(model, batches, tmp_path, monkeypatch):
    """A method whose knobs change how much it keeps, or are refused by it, or let the content decide."""
    wrong = [{"keep": 0.9}, {"layer": 7}, {"layer": 0}]

    def knobs(cls, draw, shape):
        return wrong[draw.whole("which", 0, 2)]

    monkeypatch.setattr(vlprune.FastV, "knobs", classmethod(knobs))
    found = calibrate.knobs(model, batches, "fastv", tmp_path / "fastv.json", budget=0.8, trials=6, answer_tokens=1)
    assert found.method == vlprune.FastV(budget=0.8)
    adaptive = vlprune.MustDrop(budget=0.8, global_threshold=0.1, individual_threshold=0.1)
    with pytest.raises(vlprune.BudgetError, match="by content"):
        Search(model, "mustdrop", 0.8, [answered(model, batches[0], 1)], {})._check(adaptive)


def test_the_command_on_tinyvlm_and_on_own_questions(tmp_path):
    from PIL import Image

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(APP, ["calibrate", *arguments, "--device", "cpu"], prog_name="vlprune")

    Image.new("RGB", (60, 40), (9, 99, 9)).save(tmp_path / "green.png")
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"image": "green.png", "question": "Which colour?", "answers": "green"}) + "\n"
    )
    small = ("--method", "hired", "--budget", "0.2", "--trials", "2", "--samples", "2", "--answer-tokens", "2")
    for data, version in (((), "SynthVQA 1, train"), ((str(tmp_path / "own.jsonl"),), "own.jsonl")):
        out = tmp_path / f"{len(data)}.json"
        result = invoke("tinyvlm", *data, *small, "--out", str(out))
        assert result.exit_code == 0, result.output
        assert "trial 2 of 2" in result.output
        told = json.loads(out.read_text())
        assert told["settings"]["method"] == "hired"
        assert told["calibrated"]["model"] == "TinyVLM"
        assert version in told["calibrated"]["data"]
    for wrong in (("tinyvlm", "--method", "random"), ("tinyvlm", "--method", "hired", "--budget", "2.5")):
        assert invoke(*wrong, "--out", str(tmp_path / "none.json")).exit_code == 2
