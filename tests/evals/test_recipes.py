"""Recipes can be run as they stand, and their numbers are those of their sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from vlprune import BudgetError, ModelShape, VLPruneError
from vlprune.evals import benchmarks, recipes
from vlprune.evals.loading import find_all, key_of
from vlprune.evals.recipes import Recipe, commands
from vlprune.evals.settings import UNPRUNED, Setting, parse
from vlprune.image import ImageLayout


def one_tile(rows: int, columns: int) -> ImageLayout:
    places = torch.arange(rows * columns)
    return ImageLayout(rows * columns, places[None], (rows, columns), False, (1, 1), (places.view(rows, columns),))


def five_tiles() -> ImageLayout:
    """LLaVA-NeXT at 672 x 672: the thumbnail, and four crops in rows of 48 patches that end with a token."""
    crops = 576 + torch.arange(48 * 49).view(48, 49)[:, :48]
    tiles = [torch.arange(576)] + [crops[r : r + 24, c : c + 24].flatten() for r in (0, 24) for c in (0, 24)]
    thumbnail = torch.arange(576).view(24, 24)
    return ImageLayout(576 + 48 * 49, torch.stack(tiles), (24, 24), True, (2, 2), (thumbnail, crops))


VICUNA = ModelShape(vision_layers=24, text_layers=32, feature_layer=22, has_cls=True)
GEOMETRY = {
    "llava-1.5-7b": (one_tile(24, 24), VICUNA),
    "llava-next-7b": (five_tiles(), VICUNA),
    "qwen2.5-vl-7b": (one_tile(24, 40), ModelShape(vision_layers=32, text_layers=28, feature_layer=31, has_cls=False)),
}


@pytest.fixture(params=recipes.NAMES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return recipes.load(request.param)


def test_every_setting_is_possible(recipe: Recipe):
    layout, shape = GEOMETRY[recipe.name]
    settings = parse(recipe.methods, recipe.budgets)
    assert settings[0] == Setting(UNPRUNED)
    for setting in settings[1:]:
        plan = setting.make().plan(layout, shape)
        assert plan.entering <= layout.total


def test_what_was_left_out_is_not_possible():
    """FastV lets all tokens through two of 32 layers: that is 1/16 of them, and 160 of 2880 would be less."""
    with pytest.raises(BudgetError):
        Setting("fastv", 160).make().plan(*GEOMETRY["llava-next-7b"])


def test_every_published_number_has_a_counterpart(recipe: Recipe):
    """Where a method can be run, its budgets are; and the benchmark has a number of that name."""
    asked = set(find_all(recipe.benchmarks, recipe.model))
    settings = {setting.label for setting in parse(recipe.methods, recipe.budgets)}
    methods = {setting.name for setting in parse(recipe.methods, recipe.budgets)}
    assert recipe.published
    for one in recipe.published:
        assert key_of(one.benchmark) in asked
        assert one.number in numbers_of(one.benchmark)
        assert one.setting.label in settings or one.setting.name not in methods
        assert one.source


def numbers_of(benchmark: str) -> set[str]:
    found = benchmarks.find(benchmark.partition("[")[0])
    more = {
        "pope": {"F1, mean of categories", "F1, pooled, lmms-eval"},
        "mme": {"perception + cognition", "perception"},
        "mmbench": {"accuracy, circular"},
    }
    return set(found.conventions) | more.get(found.name, set())


def test_numbers_are_percent_or_points(recipe: Recipe):
    for one in recipe.published:
        limit = {"perception": 2000, "perception + cognition": 2800}.get(one.number, 100)
        assert limit / 6 < one.value <= limit


def test_some_numbers_as_they_were_printed():
    found = {
        (one.setting.label, one.benchmark, one.number, one.source.split()[-1]): one.value
        for name in recipes.NAMES
        for one in recipes.load(name).published
    }
    assert found["flowcut 64", "mme", "perception + cognition", "other"] == 1744
    assert found["mustdrop 128", "textvqa[ocr=true]", "VQA accuracy", "other"] == 56.3
    assert found["hired 0.2", "chartqa", "relaxed accuracy", "paper"] == 42.0
    assert found["holov 0.111", "textvqa", "VQA accuracy", "paper"] == 61.8
    assert ("hired 64", "textvqa[ocr=true]", "VQA accuracy", "other") not in found


def summary(method: str, budget: float, value: float, maximum: float = 1.0) -> dict[str, Any]:
    number = {"value": value, "low": value - 0.01 * maximum, "high": value + 0.03 * maximum, "maximum": maximum}
    return {"method": method, "budget": budget, "numbers": {"VQA accuracy": number, "perception": number}}


def test_measured_stands_beside_published():
    recipe = recipes.load("llava-1.5-7b")
    summaries = {
        key_of("textvqa[ocr=true]"): [summary("none", 1.0, 0.58), summary("fastv", 64, 0.5)],
        "mme": [summary("fastv", 64, 1000, 2000)],
    }
    found = {
        (one.published.setting.label, one.published.benchmark, one.published.value): (one.measured, one.margin)
        for one in recipes.beside(recipe, summaries)
        if one.measured is not None
    }
    assert found == {
        ("none", "textvqa[ocr=true]", 58.2): (pytest.approx(58.0), pytest.approx(2.0)),
        ("fastv 64", "textvqa[ocr=true]", 47.8): (pytest.approx(50.0), pytest.approx(2.0)),
        ("fastv 64", "textvqa[ocr=true]", 52.1): (pytest.approx(50.0), pytest.approx(2.0)),
        ("fastv 64", "mme", 992.1): (pytest.approx(1000), pytest.approx(40)),
    }


def test_the_command_is_that_of_eval(recipe: Recipe):
    command = recipe.command()
    assert command[:4] == ["vlprune", "eval", "--model", recipe.model]
    assert command[command.index("--budgets") + 1] == recipe.budgets
    assert recipe.title
    assert recipe.notes


def test_unknown_recipe():
    with pytest.raises(VLPruneError, match=r"there are llava-1\.5-7b, llava-next-7b, qwen2\.5-vl-7b"):
        recipes.load("llava")


# ------------------------------------------------------------------ the command


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What ``vlprune recipe`` prints on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> str:
        commands.recipe(*arguments)
        return capsys.readouterr().out

    return run


def test_recipes_are_listed_and_described(said: Callable[..., str]):
    assert all(name in said() for name in recipes.NAMES)
    text = said("llava-next-7b")
    assert "vlprune eval --model llava-hf/llava-v1.6-vicuna-7b-hf --benchmarks 'gqa," in text
    assert "table 3 of the HiRED paper" in text


def test_a_run_is_put_beside_its_recipe(said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    summaries = {"mme": [summary("fastv", 64, 1000, 2000)]}
    run = SimpleNamespace(summaries=lambda: summaries)
    monkeypatch.setattr("vlprune.evals.report.Run.read", lambda folder: run)
    lines = [line for line in said("llava-1.5-7b", tmp_path).splitlines() if "1000.0 ±40.0" in line]
    assert [line.replace("│", " ").split() for line in lines] == [
        ["fastv", "64", "mme", "perception", "992.1", "1000.0", "±40.0", "+7.9"]
    ]


def test_an_unknown_recipe_is_told_in_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit):
        commands.recipe("llava")
    assert "unknown recipe" in capsys.readouterr().err
