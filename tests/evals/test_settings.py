"""What is written on the command line becomes the settings that are meant, or an error that says what is allowed."""

from __future__ import annotations

import pytest

import vlprune
from vlprune.evals import plot
from vlprune.evals.settings import BUDGETS, METHODS, Setting, names_each, options_of, parse, settings_of


def test_unpruned_comes_first_and_once():
    settings = settings_of(["hired", "none", "hired"], [1.0, 0.2, 1])
    assert [setting.label for setting in settings] == ["none", "hired 1.0", "hired 0.2", "hired 1"]
    assert settings_of(["hired"], [0.2]) == [Setting("hired", 0.2)]
    assert [setting.label for setting in parse("hired,none", "0.2")] == ["none", "hired 0.2"]


def test_a_method_may_bring_its_own_budgets():
    settings = parse("hired, fastv:0.8:64, none", "0.4,32")
    assert [s.label for s in settings] == ["none", "hired 0.4", "hired 32", "fastv 0.8", "fastv 64"]


def test_all_are_the_unpruned_model_and_every_method():
    settings = parse("uniform:1.0,all", "0.33,0.22")
    assert settings[0] == Setting("none")
    assert {s.method for s in settings} == {"none", *vlprune.methods()}
    assert len(settings) == 1 + 2 * len(vlprune.methods()) + 1
    assert not names_each("uniform:1.0, all:0.5")
    assert not names_each(None)
    assert names_each("hired,random")


def test_what_was_trained_for_a_model_comes_along():
    """And belongs to no other."""
    assert Setting("dyvte[router=tinyvlm-dyvte]", 0.2) in parse("all", "0.2", "tinyvlm")
    assert Setting("dyvte", 0.2) in parse("all", "0.2", "tinyvlm-qwen")


def test_options_stand_in_brackets_and_have_the_types_of_the_fields():
    (setting,) = parse("fastv[layer=1, keep=0.5]:0.6", "0.4")
    assert setting == Setting("fastv[layer=1, keep=0.5]", 0.6)
    assert setting.make() == vlprune.FastV(budget=0.6, layer=1, keep=0.5)
    assert options_of("fastv[keep=8]") == {"keep": 8}
    assert type(options_of("fastv[keep=8]")["keep"]) is int
    assert options_of("fastv[keep=none]") == {"keep": None}
    assert options_of("hired[alpha=1]") == {"alpha": 1.0}
    assert options_of("hired[allocation=sums]") == {"allocation": "sums"}
    assert options_of("random") == {}


def test_attention_sinks_may_be_left_out_of_account():
    """By an option that every method has which chooses inside the LLM, whatever fields it has."""
    bare, aware = parse("fastv[layer=1,without_sinks=false]:0.6,snapkv[ without_sinks = true, kernel=3]:0.2", "0.4")
    assert bare.make() == vlprune.FastV(budget=0.6, layer=1)
    assert aware.make() == vlprune.without_sinks(vlprune.SnapKV(budget=0.2, kernel=3))
    assert (aware.name, aware.label) == ("snapkv", "snapkv[ without_sinks = true, kernel=3] 0.2")
    assert Setting("pyramiddrop[config=tinyvlm-pyramiddrop,without_sinks=true]", 0.5).make().stages == ("prefill",)


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ("hired[without_sinks=true]", "before the LLM"),
        ("snapkv[without_sinks=2]", "allowed on the command line is bool"),
        ("fastv[layer=x]", r"fastv\[layer=x\]: allowed on the command line is int"),
        ("fastv[layr=1]", "did you mean 'layer'.* Its options: budget, layer, keep"),
        ("fastv[layer]", "name=value"),
        ("fastv[layer=1", "one pair of brackets"),
        ("fastv[layer=0]", "layer=0: allowed is"),
        ("fastv[budget=0.5]", "behind a colon"),
        ("hired[allocation=max]", "'counts', 'sums'"),
        ("hierd[alpha=1]", "did you mean 'hired'"),
        ("hired:1.5", "1.5"),
        ("hired:much", "'much'"),
        ("none:0.5", "no budget"),
    ],
)
def test_what_is_not_allowed_is_told(methods: str, told: str):
    with pytest.raises(vlprune.VLPruneError, match=told):
        parse(methods, "0.4")[0].make()


def test_each_of_the_default_methods_has_a_line_of_its_own():
    named = {setting.name for setting in parse(METHODS, BUDGETS)} - {"none", *plot.BASELINES}
    assert len(named) <= len(set(plot.STYLES))


def test_defaults_are_well_formed():
    settings = parse(METHODS, BUDGETS)
    assert settings[0] == Setting("none")
    assert Setting("uniform", 1.0) in settings
    for setting in settings[1:]:
        setting.make()
