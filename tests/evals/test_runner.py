"""A run measures what it says, keeps what it measured, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import vlprune
from vlprune.evals import journal, runner
from vlprune.evals.answering import TIMES, Answering
from vlprune.evals.batches import Task
from vlprune.evals.benchmarks.base import Benchmark, Example, answers_of
from vlprune.evals.journal import MANIFEST, Row, RunMismatchError
from vlprune.evals.metrics import EXACT_MATCH
from vlprune.evals.runner import Progress
from vlprune.evals.settings import UNPRUNED, Setting

from . import small

ROWS = "rows-00000.jsonl"
"""What the only process of a run writes."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    small.run(out)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    for name in (ROWS, MANIFEST):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    return tmp_path


def lines(out: Path) -> list[str]:
    return (out / ROWS).read_text().splitlines(keepends=True)


def same_rows(out: Path, other: Path) -> None:
    got, expected = ([small.measured_anew(row) for row in journal.read_rows(folder)] for folder in (out, other))
    assert got == expected


# ------------------------------------------------------------------ what is measured


def test_rows_hold_what_was_measured(whole: Path):
    rows = journal.read_rows(whole)
    assert len(rows) == len(small.EXAMPLES) * len(small.SETTINGS)
    assert not any(row["error"] for row in rows)
    tokens = {(row["method"], row["visual_tokens"], row["tokens"]) for row in rows}
    assert tokens == {("none", 336, 336), ("uniform", 336, 33), ("hired", 336, 24)}
    for row in rows:
        assert row[TIMES]["prefill_seconds"] > 0
        assert row[TIMES]["decode_seconds_per_token"] > 0
        assert row["steps"] == 2


def test_costs_are_those_of_a_sample(whole: Path):
    cost = {row["method"]: row for row in journal.read_rows(whole) if row["id"] == small.EXAMPLES[0].id}
    assert cost["hired"]["flops"] < cost["uniform"]["flops"] < cost["none"]["flops"]
    layers, width, float32 = 5, 160, 4
    per_token = 2 * layers * width * float32
    assert cost["none"]["cache_bytes"] - cost["hired"]["cache_bytes"] == (336 - 24) * per_token


def test_prompts_are_padded_on_the_left():
    model, processor = small.parts()
    inputs = runner.make_inputs(model, processor, [small.EXAMPLES[0], small.EXAMPLES[4]])
    assert sorted(inputs["attention_mask"][:, 0].tolist()) == [0, 1]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_nothing_is_left_on_the_model(tmp_path: Path):
    model, processor = small.parts()
    small.run(tmp_path / "plain", model=model, processor=processor, settings=[Setting(UNPRUNED)])
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    small.run(tmp_path / "pruned", model=model, processor=processor, settings=[Setting(UNPRUNED), Setting("pool", 0.1)])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(vlprune.NotAppliedError):
        vlprune.report(model)


def test_settings_take_turns_on_each_batch(whole: Path):
    seen = list(dict.fromkeys((row["batch"], row["method"]) for row in journal.raw_rows(whole)))
    assert seen == [(batch, setting.method) for batch in range(small.BATCHES) for setting in small.SETTINGS]


def test_progress_counts_samples(tmp_path: Path):
    seen: list[Progress] = []
    small.run(tmp_path, settings=[Setting(UNPRUNED)], progress=seen.append)
    assert [state.done for state in seen] == [4, 8, 12, 16, 18]
    assert {(state.total, state.resumed) for state in seen} == {(18, 0)}


# ------------------------------------------------------------------ going on


def wait_for_rows(process: subprocess.Popen[Any], out: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        if (out / ROWS).exists() and len(lines(out)) >= count:
            return
        time.sleep(0.05)
    raise TimeoutError(f"no {count} rows within five minutes")


def test_goes_on_after_kill(whole: Path, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(Path(vlprune.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, small.__file__, str(tmp_path), "--slowly"], env=environment)
    try:
        wait_for_rows(process, tmp_path, 22)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = lines(tmp_path)
    assert 22 <= len(kept) < len(lines(whole))
    seen: list[Progress] = []
    small.run(tmp_path, progress=seen.append)
    assert lines(tmp_path)[: len(kept)] == kept
    assert seen[0].resumed == len(kept)
    same_rows(tmp_path, whole)


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_torn_last_line_is_measured_again(whole: Path, copy: Path, cut: int):
    text = (copy / ROWS).read_bytes()
    (copy / ROWS).write_bytes(text[:-cut])
    small.run(copy)
    same_rows(copy, whole)


def test_incomplete_batch_is_measured_again(whole: Path, copy: Path):
    kept = lines(copy)[:-3]
    (copy / ROWS).write_text("".join(kept))
    small.run(copy)
    assert lines(copy)[: len(kept) - 1] != lines(whole)
    same_rows(copy, whole)


def test_torn_bytes_of_a_character(whole: Path, copy: Path):
    with (copy / ROWS).open("ab") as file:
        file.write('{"method": "nöne"}'.encode()[:13])
    small.run(copy)
    same_rows(copy, whole)


def test_complete_run_measures_nothing(whole: Path, copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Answering, "_generate", lambda *_: pytest.fail("measured again"))
    assert small.run(copy) == journal.read_rows(whole)
    assert lines(copy) == lines(whole)


def test_settings_may_be_added(whole: Path, copy: Path):
    more = [*small.SETTINGS, Setting("resize", 0.1)]
    rows = small.run(copy, settings=more)
    assert lines(copy)[: len(lines(whole))] == lines(whole)
    assert {row["method"] for row in rows} == {"none", "uniform", "hired", "resize"}
    assert journal.settings_in(journal.read_manifest(copy)) == more


def test_restart_forgets(copy: Path):
    before = lines(copy)
    rows = small.run(copy, settings=[Setting(UNPRUNED)], restart=True)
    assert len(rows) == len(lines(copy)) == len(small.EXAMPLES)
    assert lines(copy) != before[: len(rows)]


# ------------------------------------------------------------------ runs that do not belong together


def other_weights(model: Any, _: Path) -> dict[str, Any]:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    return {}


def other_format(_: Any, out: Path) -> dict[str, Any]:
    """Rows of an older version."""
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    return {}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (other_weights, "model sha256"),
        (lambda *_: {"batch_size": 5, "tasks": [small.task(5)]}, "generation batch_size there 4, now 5"),
        (lambda *_: {"tasks": [small.task(instruction="Be short.")]}, "benchmarks synthvqa version"),
        (lambda *_: {"tasks": [small.task(split="train")]}, "benchmarks synthvqa options split there test, now train"),
        (other_format, "format there 1, now"),
    ],
)
def test_rows_of_another_run(copy: Path, change: Callable[[Any, Path], dict[str, Any]], names: str):
    before = lines(copy)
    model, processor = small.parts()
    with pytest.raises(RunMismatchError, match=names) as caught:
        small.run(copy, model=model, processor=processor, **change(model, copy))
    assert "--out" in str(caught.value)
    assert "--restart" in str(caught.value)
    assert lines(copy) == before


def test_rows_without_manifest_are_not_deleted(copy: Path):
    (copy / MANIFEST).unlink()
    with pytest.raises(RunMismatchError, match=MANIFEST):
        small.run(copy)
    assert lines(copy)


def test_unreadable_manifest(copy: Path):
    (copy / MANIFEST).write_text("{")
    with pytest.raises(RunMismatchError, match="cannot be read"):
        small.run(copy)


def test_manifest_names_everything(whole: Path):
    manifest = json.loads((whole / MANIFEST).read_text())
    expected = {"format", "model", "benchmarks", "generation", "versions", "hardware", "settings", "sessions"}
    assert set(manifest) == expected | {"date", "commit", "command"}
    assert {"vlprune", "python", "torch", "transformers", "accelerate", "pillow"} <= set(manifest["versions"])
    assert manifest["hardware"]["device"]
    data = manifest["benchmarks"]["synthvqa"]
    assert (data["samples"], data["max_new_tokens"]) == (18, 3)
    assert data["version"].startswith("SynthVQA 1")
    hired = manifest["settings"][2]
    assert (hired["method"], hired["budget"]) == ("hired", 24)
    assert hired["knobs"] == vlprune.HiRED(budget=24).to_dict()
    assert manifest["sessions"][0]["processes"] == 1


@pytest.mark.parametrize("setting", [Setting("hierd", 0.2), Setting("hired", 1.5), Setting("hired", 0), Setting("fastv", 0.2)])
def test_impossible_setting_is_told_before_anything_is_measured(tmp_path: Path, setting: Setting):
    with pytest.raises(vlprune.VLPruneError, match=rf"^{setting.label}: "):
        small.run(tmp_path / "out", settings=[Setting(UNPRUNED), setting])
    assert not (tmp_path / "out").exists()


def test_a_budget_that_a_method_cannot_reach_names_those_it_can(tmp_path: Path):
    """FastV lets all 336 tokens through two of five layers."""
    with pytest.raises(vlprune.BudgetError, match=r"fastv 0\.3: .* a fraction of 0\.402 to 1"):
        small.run(tmp_path, settings=[Setting("fastv", 0.3)])


def test_tokens_of_each_stage(tmp_path: Path):
    """FastV keeps 336 tokens in one layer of five, and 126 in four; SnapKV all of them, and 33 in the cache."""
    settings = [Setting("fastv[layer=1]", 0.5), Setting("snapkv[window=8]", 0.1)]
    rows = small.run(tmp_path, settings=settings)
    assert not any(row["error"] for row in rows)
    tokens = {row["method"]: tuple(row[k] for k in ("tokens", "layer_tokens", "cached_tokens")) for row in rows}
    assert tokens == {"fastv[layer=1]": (336, 168, 168), "snapkv[window=8]": (336, 336, 33)}


# ------------------------------------------------------------------ samples that fail


class FailsOn:
    """A processor that cannot read one question."""

    def __init__(self, processor: Any, question: str):
        self._processor = processor
        self._question = question

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, text: list[str], **options: Any) -> Any:
        if any(self._question in prompt for prompt in text):
            raise ValueError("unreadable image")
        return self._processor(text=text, **options)


def test_a_failing_sample_is_recorded_and_wrong(whole: Path, tmp_path: Path):
    model, processor = small.parts()
    victim = small.EXAMPLES[2]
    alike = [e.id for e in small.EXAMPLES if e.question == victim.question]
    processor = FailsOn(processor, victim.question)
    rows = small.run(tmp_path, model=model, processor=processor, settings=[Setting(UNPRUNED)])
    assert len(rows) == len(small.EXAMPLES)
    failed = [row for row in rows if row["error"]]
    assert [row["id"] for row in failed] == alike
    assert {(row["error"], row["score"], row["prediction"]) for row in failed} == {("ValueError: unreadable image", 0.0, None)}
    expected: dict[str, Row] = {row["id"]: row for row in journal.read_rows(whole) if row["method"] == UNPRUNED}
    assert all(row["prediction"] == expected[row["id"]]["prediction"] for row in rows if not row["error"])
    small.run(tmp_path, model=model, processor=processor, settings=[Setting(UNPRUNED)])
    assert len(lines(tmp_path)) == len(rows)


class OutOfMemory:
    """Stands in for ``generate`` of a model on a device that holds two samples, not four."""

    def __init__(self, generate: Callable[..., Any]):
        self._generate = generate
        self.batches: list[int] = []

    def __call__(self, *arguments: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        self.batches.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._generate(*arguments, input_ids=input_ids, **options)


def test_out_of_memory_halves_the_batch(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, processor = small.parts()
    generate = OutOfMemory(model.generate)
    monkeypatch.setattr(model, "generate", generate)
    rows = small.run(tmp_path, model=model, processor=processor)
    assert not any(row["error"] for row in rows)
    assert {row["batch_size"] for row in rows} == {2}
    assert generate.batches[:4] == [4, 4, 2, 2]  # once unrecorded, then as it must be
    expected = [(row["id"], row["prediction"]) for row in journal.read_rows(whole)]
    assert [(row["id"], row["prediction"]) for row in rows] == expected


def unreadable() -> bytes:
    raise OSError("the disk is gone")


@dataclass(frozen=True, kw_only=True)
class Odd(Benchmark):
    """What real data may hold."""

    name = "odd"
    title = "Odd"
    conventions = {"exact match": lambda prediction, row: EXACT_MATCH.sample(prediction, answers_of(row))}
    version = "1"

    def examples(self, limit: int | None = None) -> list[Example]:
        def example(name: str, picture: Any, question: str = "What is it?", answers: tuple[str, ...] = ("it",)) -> Example:
            return Example(name, "", question, answers, picture)

        def image(width: int, height: int) -> Image.Image:
            return Image.new("RGB", (width, height), "red")

        return [
            example("plain", image(128, 128)),
            example("long", image(128, 128), "What is the city? " * 556),
            example("dot", image(1, 1)),
            example("wide", image(8000, 50)),
            example("no image", b"\xff\xd8 corrupt"),
            example("no file", unreadable),
            example("no answers", image(128, 128), answers=()),
            example("surrogate", image(128, 128), "half a pair: \ud83d"),
        ]


def test_odd_samples_are_recorded_and_nothing_is_lost(tmp_path: Path):
    settings = [Setting("none"), Setting("hired", 0.2)]
    rows = small.run(tmp_path, settings=settings, tasks=[Task.of("odd", Odd(), 2, max_new_tokens=2)], batch_size=2)
    assert [(row["method"], row["id"]) for row in rows] == [(s.method, e.id) for s in settings for e in Odd().examples()]
    failed = {row["id"]: row["error"] for row in rows if row["error"]}
    # LLaVA-NeXT's own code fails on strips so thin that no row of patches is left, its tokenizer on half a character.
    # Image processors of transformers 4.57 take an image of one pixel for one with a single channel.
    dot = {"dot"} if int(transformers.__version__.split(".")[0]) < 5 else set()
    assert failed.keys() == {"no image", "no file", "wide", "surrogate"} | dot, failed
    assert failed["no image"].startswith("ImageError: no image: 10 bytes that cannot be read as an image")
    assert "0x" not in failed["no image"]
    assert {(row["id"], row["error"]) for row in rows if row["prediction"] is None} == set(failed.items())
    assert not any(row["score"] for row in rows)
    before = [path.read_bytes() for path in journal.row_files(tmp_path)]
    small.run(tmp_path, settings=settings, tasks=[Task.of("odd", Odd(), 2, max_new_tokens=2)], batch_size=2)
    assert [path.read_bytes() for path in journal.row_files(tmp_path)] == before


def test_failed_batches_can_be_tried_again(whole: Path, tmp_path: Path):
    model, processor = small.parts()
    unsteady = FailsOn(processor, small.EXAMPLES[2].question)
    small.run(tmp_path, model=model, processor=unsteady)
    rows = small.run(tmp_path, model=model, processor=processor, retry_errors=True)
    assert [small.measured_anew(row) for row in rows] == [small.measured_anew(row) for row in journal.read_rows(whole)]


def test_two_runs_do_not_share_a_folder(tmp_path: Path):
    with journal.locked(tmp_path), pytest.raises(vlprune.VLPruneError, match="another run is writing"):
        small.run(tmp_path)
