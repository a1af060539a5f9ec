"""Settings from files, presets for kinds of models, and what a calibration may try: none of it changes a budget."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

import vlprune
from tests import zoo
from tests.between import LAYOUTS
from tests.vit.models import build as build_vit
from vlprune import config, presets
from vlprune.api import chosen
from vlprune.budget import room
from vlprune.calibrate.search import searchable, spending
from vlprune.calibrate.states import answered, distance
from vlprune.engine.patch import patch_of
from vlprune.evals.settings import Setting
from vlprune.image import ModelShape

SHAPES = [ModelShape(24, 32, 22, has_cls=True), ModelShape(4, 5, 3, has_cls=False), ModelShape(4, 2, 3, has_cls=False)]


class Dice:
    """Draws by chance, now and then an end of a range."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def number(self, name: str, low: float, high: float) -> float:
        return self.random.choice((low, high, *(self.random.uniform(low, high) for _ in range(4))))

    def whole(self, name: str, low: int, high: int) -> int:
        assert low <= high, name
        return self.random.randint(low, high)

    def choice(self, name: str, values: Any) -> Any:
        return self.random.choice(list(values))


def applied_method(model: Any) -> vlprune.Method:
    return patch_of(model).method


# ------------------------------------------------------------------ config


def test_apply_takes_settings_from_a_file_and_options_on_top(tmp_path):
    model = zoo.build("llava_next")
    method = vlprune.PyramidDrop(budget=0.6, layers=(1, 3), split=(0.7, 0.2))
    for name, content in (("plain", method.to_dict()), ("told", {"settings": method.to_dict(), "calibrated": {"loss": 0.1}})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        assert applied_method(vlprune.apply(model, config=path)) == method
        with vlprune.applied(model, config=str(path), budget=0.7):
            assert applied_method(model) == vlprune.PyramidDrop(budget=0.7, layers=(1, 3), split=(0.7, 0.2))
        assert Setting(f"pyramiddrop[config={path}]", 0.5).make().budget == 0.5
        with pytest.raises(vlprune.OptionError, match="of pyramiddrop; write pyramiddrop"):
            Setting(f"hired[config={path}]", 0.5).make()


def test_what_is_no_config_is_told_and_leaves_the_model_as_it_is(tmp_path):
    model = zoo.build("llava")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "text.json").write_text("hired")
    for name, message in (("list", "no JSON of a method"), ("empty", "names no method"), ("text", "no JSON of a method")):
        with pytest.raises(vlprune.OptionError, match=message):
            vlprune.apply(model, config=tmp_path / f"{name}.json")
    with pytest.raises(vlprune.OptionError, match="no such file"):
        vlprune.apply(model, config="tinyvlm-nothing")
    with pytest.raises(vlprune.OptionError, match="method and preset each name a method"):
        vlprune.apply(model, "hired", preset="fast")
    assert patch_of(model) is None


def test_shipped_settings_lost_less_in_their_search_than_the_published_ones():
    for name in config.shipped():
        method, told = config.read(name), json.loads((config.FOLDER / f"{name}.json").read_text())["calibrated"]
        stem = f"{told['model'].lower()}-{method.name}"
        assert name in (stem, f"{stem}-{method.budget}")
        assert (told["method"], told["budget"]) == (method.name, method.budget)
        assert told["loss"] < told["loss of the defaults"]
        assert method != vlprune.from_dict({"method": method.name, "budget": method.budget})
        assert "train" in told["data"]


# ------------------------------------------------------------------ presets


def test_without_a_method_the_kind_of_model_decides():
    for family, kind in (("llava_next", presets.CLS), ("internvl", presets.CLS), ("llava_siglip", presets.PLAIN)):
        model, inputs = zoo.build(family), zoo.prompt(family)
        assert applied_method(vlprune.apply(model)) == presets.PRESETS[kind]["balanced"].make()
        for name, preset in presets.PRESETS[kind].items():
            vlprune.apply(model, preset=name, budget=0.5)
            assert applied_method(model) == vlprune.from_dict({"method": preset.method, "budget": 0.5})
            model(**inputs)
            report = vlprune.report(model)
            assert isinstance(report, vlprune.Report)
            assert 0 < report.cached < report.total
        vlprune.apply(model, preset="quality", without_sinks=True)
        assert applied_method(model) == vlprune.without_sinks(presets.PRESETS[kind]["quality"].make())
    assert chosen(build_vit("vit classifier"), "fast") == presets.PRESETS[presets.VIT]["fast"].make()


def test_presets_have_the_same_names_everywhere_and_unknown_ones_are_refused():
    assert {tuple(named) for named in presets.PRESETS.values()} == {("quality", "balanced", "fast")}
    with pytest.raises(vlprune.OptionError, match="'quality', 'balanced', 'fast'"):
        vlprune.apply(zoo.build("llava"), preset="best")


# ------------------------------------------------------------------ what may be tried


def test_whatever_is_drawn_the_budget_is_met():
    layouts = [layout for make in LAYOUTS.values() if (layout := make()).total > 1]
    for name in searchable():
        cls, met = vlprune.methods()[name], 0
        for seed, shape in enumerate(SHAPES * 8):
            try:
                method = cls(budget=0.6, **cls.knobs(Dice(seed), shape))
                spent = [spending(method, layout, shape) for layout in layouts]
            except vlprune.BudgetError:
                continue
            met += 1
            assert not method.adaptive
            for layout, tokens in zip(layouts, spent, strict=True):
                limit = room(0.6, layout.total, shape.text_layers)
                # Counts are whole, in front of the LLM and in each of its stages.
                assert limit - 2 * shape.text_layers < tokens <= limit, (method, shape, tokens, limit)
        assert met >= 4, name


def test_stages_are_split_by_shares():
    shape, layout = ModelShape(24, 32, 22, has_cls=True), LAYOUTS["2 x 2 crops"]()
    published = vlprune.PyramidDrop(budget=0.5).plan(layout, shape)
    assert vlprune.PyramidDrop(budget=0.5, split=(0.5, 0.25, 0.125)).plan(layout, shape) == published
    assert vlprune.PyramidDrop(budget=0.5, split=(0.25, 1 / 16, 1 / 64)).plan(layout, shape) == published
    early = vlprune.PyramidDrop(budget=0.5, split=(0.3, 0.3, 0.3)).plan(layout, shape)
    assert len(set(early.at_layers(32))) <= 3
    assert early.prefill[8] < published.prefill[8]
    for wrong in ((0.5, 0.25), (0.5, 0.6, 0.1), (1.5, 0.5, 0.1), (0.5, 0.1, 0.0)):
        with pytest.raises(vlprune.OptionError, match="3 shares"):
            vlprune.PyramidDrop(split=wrong)
    with pytest.raises(vlprune.OptionError, match="keep says"):
        vlprune.PyramidDrop(split=(0.5, 0.2, 0.1), keep=(0.5, 0.2, 0.1))


# ------------------------------------------------------------------ how far a pruned model is from the unpruned one


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_states_are_those_that_the_answer_is_read_from(family):
    model, inputs = zoo.build(family), zoo.prompt(family, images=(1, 2), words=(3, 6))
    model.generation_config.suppress_tokens = [zoo.IMAGE, zoo.VIDEO]
    whole = answered(model, inputs, 4)
    assert whole.answer.shape == (2, 4)
    assert whole.counts.all()
    logits = model.lm_head(whole.states)
    logits[..., [zoo.IMAGE, zoo.VIDEO]] = -torch.inf
    assert torch.equal(logits.argmax(-1).T, whole.answer)
    # An answer that has ended says nothing more, and what is behind it does not count.
    end = model.generation_config.eos_token_id = int(whole.answer[0, 1])
    ended, last = answered(model, inputs, 4), whole.answer[0].tolist().index(end)
    assert ended.counts[:, 0].tolist() == [step <= last for step in range(len(ended.counts))]


def test_distance_is_nothing_for_what_does_nothing_and_sees_every_stage():
    model, inputs = zoo.build("llava_next"), zoo.prompt("llava_next", images=(1, 1), words=(3, 6))
    model.generation_config.suppress_tokens = [zoo.IMAGE, zoo.VIDEO]
    whole = answered(model, inputs, 3)
    assert distance(model, vlprune.HiRED(budget=1.0), whole).abs().max() < 1e-6
    apart = [distance(model, method, whole) for method in (vlprune.HiRED(budget=0.9), vlprune.HiRED(budget=0.1))]
    assert (apart[0] < apart[1]).all()
    # What leaves the cache is missed by the second token of the answer, not by the first.
    first = answered(model, inputs, 1)
    assert distance(model, vlprune.SnapKV(budget=0.1), first).abs().max() < 1e-6
    assert distance(model, vlprune.SnapKV(budget=0.1), whole).min() > 1e-4
    assert patch_of(model) is None
    assert not model.lm_head._forward_pre_hooks
