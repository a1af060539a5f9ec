"""The commands, as a person meets them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import vlprune.kernels
from vlprune.bench import commands, journal, kernel_rows, kernels, model, suite

WIDE = {"COLUMNS": "200", "TERM": "dumb"}
TINY = ["model", "--like", "llava-next-tiny", "--device", "cpu", "--rounds", "2", "--new-tokens", "2", "--words", "16"]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(commands.app, list(arguments), env=WIDE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with rows of both kinds, and what was printed."""
    folder = tmp_path_factory.mktemp("results")
    result = invoke("all", "--smoke", "--device", "cpu", "--out", str(folder))
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_every_operation_is_measured(measured: tuple[Path, str]):
    rows = journal.read(measured[0] / "kernels.csv")
    assert [row for row in rows if row["error"]] == []
    variants = [kernel_rows.REFERENCE] + [kernel_rows.TRITON] * (HAS_TRITON and not torch.cuda.is_available())
    for name in kernels.CASES:
        assert [row["variant"] for row in rows if row["operation"] == name] == variants
    assert {name.split()[0] for name in kernels.CASES} == {
        name for name in vlprune.kernels.__all__ if name not in ("unavailable", "using") and not name.endswith("_")
    }
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["share_of_ceiling"] > 0
        assert row["device"]
        assert row["command"]
    assert all((row["times_beside"] is not None) == (row["operation"] == "attention_columns") for row in rows)


def test_every_variant_is_measured(measured: tuple[Path, str]):
    rows = journal.read(measured[0] / "model.csv")
    wanted = [variant.label for variant in suite.variants_of(suite.FEW)]
    assert [row["error"] for row in rows] == [None] * len(rows)
    for batch in (1, 2):
        group = [row for row in rows if row["batch"] == batch]
        assert len(group) == len(wanted)
        for row in group:
            assert row["prefill_ms_p50"] > 0
            assert row["floor_ms"] > 0
            assert row["decode_reference_ms"] > 0
            assert row["peak_mib"] > row["cache_mib"] > 0
        whole, pruned = (next(r for r in group if r["method"] == "uniform" and r["budget"] == b) for b in ("1.0", "0.4"))
        assert whole["entering"] == whole["visual_tokens"] == 336
        assert pruned["entering"] == 134
        assert pruned["gflops"] < whole["gflops"]


def test_tables_are_printed_in_full(measured: tuple[Path, str]):
    assert "…" not in measured[1]
    assert "of floor" in measured[1]


def test_plot_makes_pictures(measured: tuple[Path, str], tmp_path: Path):
    result = invoke("plot", str(measured[0] / "model.csv"), "--out", str(tmp_path))
    assert result.exit_code == 0
    for name in ("speed.png", "parts.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (measured[0] / name).exists()


def test_report_fills_the_documents(measured: tuple[Path, str], tmp_path: Path):
    page = tmp_path / "speed.md"
    page.write_text("# Speed\n\nWords.\n\n<!-- measured:speed -->\nold\n<!-- end of measured:speed -->\n\nMore words.\n")
    for _ in range(2):
        result = invoke("report", str(measured[0]), "--docs", str(tmp_path))
        assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.startswith("# Speed\n\nWords.")
    assert text.endswith("More words.\n")
    assert "old" not in text
    assert text.count("## llava-next-7b tiny") == 0
    assert "results/speed.md" in text
    models, operations = ((tmp_path / "results" / name).read_text() for name in ("speed.md", "speed-kernels.md"))
    assert models.count("| hired | 0.4 |") == 4
    assert operations.count("| gather_rows |") == 1 + HAS_TRITON
    for link in ("images/speed/1/speed.png", "images/speed/2/parts.png"):
        assert (tmp_path / link).exists()


def test_resume_measures_what_is_missing_only(tmp_path: Path):
    out = tmp_path / "rows.csv"
    first = [*TINY, "--out", str(out), "--methods", "uniform:0.4"]
    assert invoke(*first).exit_code == 0
    assert len(journal.read(out)) == 3
    assert invoke(*first, "--resume").exit_code == 0
    assert len(journal.read(out)) == 3
    more = [*TINY, "--out", str(out), "--methods", "uniform:0.4:0.2", "--resume"]
    assert invoke(*more).exit_code == 0
    # The unpruned model ran again, since what is new is compared with it round by round.
    assert [row["budget"] for row in journal.read(out)] == ["1.0", "1.0", "0.4", "1.0", "1.0", "0.2"]


def test_a_trained_model_can_be_measured(tmp_path: Path):
    out = tmp_path / "rows.csv"
    result = invoke(
        "model", "--model", "tinyvlm", "--device", "cpu", "--rounds", "1", "--methods", "uniform:0.2", "--out", str(out)
    )
    assert result.exit_code == 0, result.output
    assert {row["model"] for row in journal.read(out)} == {"TinyVLM"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["kernels", "--operations", "sort"], "unknown 'sort'; known are gather_rows"),
        (["kernels", "--shapes", "huge"], "unknown 'huge'; known are llava-1.5"),
        (["kernels", "--dtype", "int8"], "allowed are auto, float32"),
        (["kernels", "--device", "tpu"], "allowed are auto, cpu, cuda"),
        (["model", "--like", "gpt"], "known sizes are llava-1.5-7b"),
        (["model", "--like", "llava-1.5-7b", "--scale", "half"], "allowed are full, small, tiny"),
        (["model", "--like", "llava-1.5-tiny", "--model", "tinyvlm"], "give one of them"),
        (["model", "--like", "llava-1.5-tiny", "--methods", "magic"], "magic"),
        (["model", "--like", "llava-1.5-tiny", "--methods", "fastv[layers=1]"], "layers"),
        (["model", "--like", "llava-1.5-tiny", "--methods", "uniform:1.5"], "1.5"),
        (["model", "--like", "llava-1.5-tiny", "--batch", "0"], "whole numbers from 1"),
        (["model", "--like", "llava-1.5-tiny", "--batch", "two"], "whole numbers from 1"),
        (["model", "--like", "llava-1.5-tiny", "--image", "336"], "height and width in pixels"),
        (["model", "--model", "/nowhere"], "cannot load '/nowhere'"),
        (["serve", "--like", "gpt"], "known sizes are llava-1.5-7b"),
        (["serve", "--like", "llava-next-tiny", "--concurrency", "0"], "whole numbers from 1"),
        (["serve", "--like", "llava-next-tiny", "--methods", "magic"], "magic"),
        (["serve", "--like", "llava-next-tiny"], "vLLM cannot be imported"),
        (["plot", "/nowhere.csv"], "cannot read /nowhere.csv"),
        (["report", "/nowhere"], "/nowhere holds no rows"),
        (["all", "--only", "cache"], "unknown 'cache'; known are kernels, model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_written_wrongly_is_told(arguments: list[str], told: str, tmp_path: Path):
    out = tmp_path / "rows.csv"
    more = [] if arguments[0] in ("plot", "report") else ["--out", str(out)]
    result = invoke(*arguments, *more)
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.output.split())
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path):
    assert "sees no GPU" in invoke("kernels", "--device", "cuda", "--out", str(tmp_path / "rows.csv")).output


def test_on_a_gpu_the_suite_measures_what_the_documents_promise():
    """The plan of a GPU, which needs none."""
    plan = suite.plan(torch.device("cuda"))
    assert plan.dtype is torch.bfloat16
    assert {shape.tokens for shape in plan.shapes} == {576, 2880, 4096, 16384}
    assert plan.compiled
    sizes = [(size.name, one.batches) for size, one in plan.models]
    assert sizes == [("llava-next-7b", (1,)), ("llava-next-7b", (8,))]
    minutes = (plan.minutes or 0) + sum((one.minutes or 0) * len(one.attentions) for _, one in plan.models)
    assert minutes <= 16
    wanted = {variant.label for variant in plan.models[0][1].variants}
    for method in ("hired", "flowcut", *(["divprune"] if "divprune" in vlprune.methods() else [])):
        assert {f"{method} {budget}" for budget in (0.4, 0.2, 0.1)} <= wanted
    assert {"uniform 1.0", "none"} <= wanted


def test_columns_are_told_apart():
    assert set(model.COLUMNS) & set(kernel_rows.COLUMNS) >= {"device", "commit", "command"}
    assert len(set(model.COLUMNS)) == len(model.COLUMNS)
