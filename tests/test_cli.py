"""The command line, as a person meets it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import vlprune
from vlprune import cli, shell
from vlprune.evals import commands, journal, loading, progress, runner, settings
from vlprune.evals.answering import Answering
from vlprune.evals.tinyvlm import build

from .evals import small

WIDE = {"COLUMNS": "120", "TERM": "dumb"}
APP = shell.application(cli.COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model in the hub's format, with random weights."""
    path = tmp_path_factory.mktemp("model")
    build.model(0).save_pretrained(path)
    build.processor().save_pretrained(path)
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(APP, list(arguments), env=WIDE, prog_name="vlprune")


def few(folder: str, out: Path, *more: str) -> list[str]:
    small = ["--model", folder, "--samples", "12", "--batch-size", "6", "--device", "cpu", "--out", str(out)]
    return ["eval", *small, "--methods", "none,uniform", "--budgets", "0.1", *more]


def test_methods_lists_every_method():
    result = invoke("methods")
    assert result.exit_code == 0
    for heading in ("name", "stages", "serves", "budget", "needs", "paper"):
        assert heading in result.output
    for name in [*vlprune.methods(), *vlprune.methods("vit")]:
        assert name in result.output


def test_methods_for_scripts():
    """What is printed is what the classes say."""
    found = {one["name"]: one for one in json.loads(invoke("methods", "--json").output)}
    assert list(found) == [*vlprune.methods(), *vlprune.methods("vit")]
    assert found["hired"]["stages"] == ["select"]
    assert found["hired"]["needs"] == ["ClsAttention"]
    assert found["hired"]["options"] == {"budget": 0.2, "alpha": 0.5, "allocation": "counts"}
    assert found["mustdrop"]["stages"] == ["encode", "select", "prefill", "evict"]
    assert found["tome"]["serves"] == ["vit"]
    assert "2408.10945" in found["hired"]["paper"]


def test_models_lists_families():
    result = invoke("models")
    assert result.exit_code == 0
    assert "llava_next" in result.output
    found = {one["name"]: one for one in json.loads(invoke("models", "--json").output)}
    assert {one.name for one in vlprune.supported_models()} < set(found)
    assert found["Qwen2.5-VL"]["videos"]
    assert found["DINOv2"]["serves"] == "vit"


def test_tables_lose_nothing_in_a_narrow_terminal():
    output = CliRunner().invoke(APP, ["methods"], env={"COLUMNS": "60", "TERM": "dumb"}).output
    assert "…" not in output


def test_help_says_what_each_command_says():
    """Commands are named before they are imported: their lines are those with which their own help begins."""
    output = " ".join(invoke("--help").output.split())
    for name, (where, summary) in cli.COMMANDS.items():
        assert f"{name} {summary}"[:60] in re.sub("[│ ]+", " ", output)
        own = " ".join(invoke(name, "--help").output.split())
        assert "Example: vlprune" in own or isinstance(shell.load(where), typer.Typer)


def test_help_imports_no_command():
    """``vlprune --help`` and completion do not wait for what commands need."""
    program = (
        "import sys; from vlprune import cli; sys.argv = ['vlprune', '--help']\n"
        "try: cli.main()\nexcept SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"vlprune.listing", "vlprune.evals.commands", "vlprune.bench", "matplotlib", "vlprune.engine.patch"}


@pytest.mark.parametrize(
    ("words", "offered"),
    [("rep", {"report"}), ("bench m", {"model"}), ("eval --bud", {"--budgets"}), ("methods --j", {"--json"})],
)
def test_completion_offers_commands_and_options(words: str, offered: set[str]):
    environment = {
        "_VLPRUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": f"vlprune {words}",
        "COMP_CWORD": str(words.count(" ") + 1),
    }
    result = CliRunner().invoke(APP, [], prog_name="vlprune", env=environment)
    assert set(result.output.split()) == offered


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["evla"], "No such command 'evla'. Did you mean 'eval'? See 'vlprune --help'"),
        (["eval", "--methdos", "none"], "See 'vlprune eval --help'"),
        (["bench", "model", "--rounds", "many"], "See 'vlprune bench model --help'"),
        (["report"], "Missing argument 'folders'. See 'vlprune report --help'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line_with_the_way_out(arguments: list[str], told: str):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("vlprune: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "hierd"], "hired"),
        (["--budgets", "much"], "'much'"),
        (["--budgets", "1.5"], "1.5"),
        (["--budgets", "nan"], "nan"),
        (["--budgets", "0"], "0"),
        (["--methods", ","], "--methods"),
        (["--methods", "fastv[layr=1]"], "layer"),
        (["--methods", "fastv:much"], "'much'"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--benchmarks", "synthvq"], "synthvq"),
        (["--benchmarks", "synthvqa[colour=red]"], "colour"),
        (["--benchmarks", ","], "--benchmarks"),
        (["--benchmarks", "synthvqa,synthvqa"], "both"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], told: str, tmp_path: Path):
    result = invoke("eval", "--out", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("vlprune: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_eval_from_plan_to_picture(folder: str, tmp_path: Path):
    result = invoke(*few(folder, tmp_path))
    assert result.exit_code == 0, result.output
    assert "2 settings x 12 samples" in result.output
    assert "24/24 answers" in result.output
    for heading in ("enter", "layers", "cache", "score", "agree", "prefill", "GFLOP"):
        assert heading in result.output
    for name in ("summary.json", "table.md", "table.csv", "accuracy.png", "time.png"):
        assert (tmp_path / name).exists()
        assert name in result.output


def test_a_method_with_options_and_budgets_of_its_own(folder: str, tmp_path: Path):
    result = invoke(*few(folder, tmp_path), "--methods", "none,fastv[layer=1]:0.5,uniform")
    assert result.exit_code == 0, result.output
    assert "fastv[layer=1]  0.5" in result.output
    assert {(row["method"], row["budget"]) for row in journal.read_rows(tmp_path)} == {
        ("none", 1.0),
        ("fastv[layer=1]", 0.5),
        ("uniform", 0.1),
    }


def test_what_a_model_cannot_have_is_told_before_anything_is_measured(folder: str, tmp_path: Path):
    result = invoke(*few(folder, tmp_path / "out"), "--methods", "none,fastv:0.2")
    assert result.exit_code == 2
    assert "fastv 0.2: budget=0.2 allows 67" in result.stderr
    assert not (tmp_path / "out").exists()


def test_defaults_that_a_model_cannot_have_are_left_out_and_told(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settings, "METHODS", "none,fastv,uniform")
    arguments = [a for a in few(folder, tmp_path) if a not in ("--methods", "none,uniform")]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "Left out: fastv 0.1: budget=0.1 allows 33" in " ".join(result.output.split())
    assert {row["method"] for row in journal.read_rows(tmp_path)} == {"none", "uniform"}
    (session,) = journal.read_manifest(tmp_path)["sessions"]
    assert list(session["not_possible"]) == ["fastv 0.1"]


def test_each_model_has_a_folder():
    folders = [loading.folder(model) for model in ("tinyvlm", "tinyvlm-qwen", "llava-hf/llava-1.5-7b-hf", "./a model/")]
    assert [str(f) for f in folders] == [f"results/eval{end}" for end in ("", "-tinyvlm-qwen", "-llava-1.5-7b-hf", "-a-model")]


def test_other_samples_need_another_folder_or_a_restart(folder: str, tmp_path: Path):
    assert invoke(*few(folder, tmp_path)).exit_code == 0
    fewer = few(folder, tmp_path, "--samples", "6")
    result = invoke(*fewer)
    assert result.exit_code == 2
    assert "--restart" in result.stderr
    assert invoke(*fewer, "--restart").exit_code == 0
    assert len(journal.read_rows(tmp_path)) == 12


def test_failures_are_told(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("no [memory] left")

    monkeypatch.setattr(Answering, "_generate", broken)
    result = invoke(*few(folder, tmp_path))
    assert result.exit_code == 0, result.output
    assert re.search(r"24 samples failed.*RuntimeError: no \[memory\] left", " ".join(result.output.split()))


def test_interrupt_says_what_is_kept_and_goes_on(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C once the first batch is on disk."""
    append = journal.Journal.append

    def append_and_interrupt(journal: Any, rows: Any) -> None:
        append(journal, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", append_and_interrupt)
        result = invoke(*few(folder, tmp_path))
    kept = len(journal.read_rows(tmp_path))
    assert result.exit_code == 130, result.output
    assert f"{kept} rows are kept" in result.output
    assert 0 < kept < 24
    done = invoke(*few(folder, tmp_path))
    assert "24/24 answers" in done.output
    assert len(journal.read_rows(tmp_path)) == 24


def test_interrupt_before_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "model", interrupted)
    result = invoke("eval", "--out", str(tmp_path))
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert str(caught.value) == 'vlprune: the command line needs typer: pip install "vlprune[evals]"'


def test_remaining_time_is_printed_where_no_terminal_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 30.0, 31.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    plain = progress.PlainProgress(commands.Console(width=120, highlight=False))
    for done in (110, 130, 200):
        plain(runner.Progress(settings.Setting("hired", 0.2), small.TASK, done, 200, resumed=100))
    assert capsys.readouterr().out.splitlines() == [
        "130/200 answers, synthvqa, hired 0.2, about 1:10 left",
        "200/200 answers, synthvqa, hired 0.2, about 0:00 left",
    ]
