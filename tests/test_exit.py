"""Leaving all at once: a static exit, and ToDRE's, which waits until the text looks elsewhere."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests import inside, zoo
from vlprune.integrations.llava import single
from vlprune.methods.staged import TEXT
from vlprune.methods.todre import ToDRE


def test_an_exit_takes_whole_layers():
    """As many as the budget allows."""
    for budget, layer in ((0.5, 16), (0.52, 16), (0.04, 1), (144, 8), (0.99, 31)):
        assert vlprune.VisualExit(budget=budget).plan(single(24), inside.LLAVA).prefill == {layer: 0}
    assert vlprune.VisualExit(layer=20).plan(single(24), inside.LLAVA).at_layers(32) == [576] * 20 + [0] * 12
    assert vlprune.VisualExit(budget=1.0).plan(single(24), inside.LLAVA).prefill == {}


def test_an_exit_that_cannot_be():
    with pytest.raises(vlprune.BudgetError, match="allows 18 to 576"):
        vlprune.VisualExit(budget=17).plan(single(24), inside.LLAVA)
    with pytest.raises(vlprune.OptionError, match="layers 0 to 31"):
        vlprune.VisualExit(layer=32).plan(single(24), inside.LLAVA)
    with pytest.raises(vlprune.OptionError, match="from 1 on"):
        vlprune.VisualExit(layer=0)


def test_nothing_is_left_in_later_layers_and_their_caches():
    """The report says so, and so do the cache's layers."""
    model, inputs = zoo.build("llava"), zoo.prompt("llava")
    with vlprune.applied(model, vlprune.VisualExit(layer=2)):
        cache = zoo.generate(model, inputs, new_tokens=1).past_key_values
        report = inside.report(model)
    length, total = inputs["input_ids"].shape[1], report.total
    assert [layer.keys.shape[2] for layer in cache.layers] == [length, length, length - total, length - total]
    assert report.layer_mean == report.cached == total / 2
    assert report.leaving == 0
    assert report.images[0].stages[-1].kept == []


@pytest.mark.parametrize("content", inside.CONTENTS)
def test_todre_exits_where_attention_has_faded(content):
    """All of an image leaves, or none of it."""
    for threshold in (0.0, 0.1, 0.4, 1.0):
        method = ToDRE(budget=0.9, exit_threshold=threshold)
        for make in inside.LAYOUTS.values():
            layout = make()
            plan = method.plan(layout, inside.SHAPE)
            assert list(plan.prefill) == [7]
            tokens = inside.before_layer(method, layout, 7, torch.arange(plan.entering), content)
            last = int(tokens.visual[-1])
            rows = [
                row for row, place in zip(tokens[TEXT][0].double().tolist(), tokens.text.tolist(), strict=True) if place > last
            ]
            share = sum(map(sum, rows)) / len(rows)
            expected = [] if share < threshold - 1e-7 else list(range(plan.entering))
            assert method.prefill(tokens).keep.tolist() == expected


def test_todre_without_a_threshold_stays_out_of_the_llm():
    assert ToDRE().stages == ("select",)
    assert not ToDRE().adaptive
    assert ToDRE().plan(single(24), inside.LLAVA).prefill == {}
    assert list(ToDRE(exit_threshold=0.1).plan(single(24), inside.LLAVA).prefill) == [28]
    with pytest.raises(vlprune.OptionError, match="share from 0 to 1"):
        ToDRE(exit_threshold=2.0)
    with pytest.raises(vlprune.OptionError, match="layers 1 to 31"):
        ToDRE(exit_threshold=0.1, exit_layer=32).plan(single(24), inside.LLAVA)
