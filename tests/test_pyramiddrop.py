"""PyramidDrop against its definition written out, and what methods that drop at several layers have in common."""

from __future__ import annotations

import pytest

import vlprune
from tests import inside
from vlprune.integrations.llava import single
from vlprune.methods.pyramiddrop import LAST

TINY = vlprune.ModelShape(vision_layers=4, text_layers=5, feature_layer=2, has_cls=True)


@pytest.mark.parametrize("content", inside.CONTENTS)
@pytest.mark.parametrize("budget", [0.35, 0.6, 20])
def test_the_last_tokens_attention_decides(budget, content):
    seen = 0
    for seed in range(2):
        for tokens, selection in inside.journeys(vlprune.PyramidDrop(budget=budget), content, seed):
            attention = tokens[LAST][0, 0].tolist()
            assert selection.keep.tolist() == inside.best(attention, tokens.count)
            seen += 1
    assert seen >= 6


# ------------------------------------------------------------------ the plan of a staged method


def test_the_published_schedule():
    """576 tokens, 32 layers: 288, 144 and 72 before layers 8, 16 and 24, which is a mean of 270."""
    plan = vlprune.PyramidDrop().plan(single(24), inside.LLAVA)
    assert plan.prefill == {8: 288, 16: 144, 24: 72}
    assert plan == vlprune.PyramidDrop(budget=270).plan(single(24), inside.LLAVA)
    assert plan == vlprune.PyramidDrop(keep=(0.5, 0.25, 0.125)).plan(single(24), inside.LLAVA)


@pytest.mark.parametrize("shape", [inside.LLAVA, inside.SHAPE, TINY])
def test_the_mean_over_the_layers_is_the_budget(shape):
    """Exactly, but for less than the shortest stage."""
    depth = shape.text_layers
    for budget in (0.35, 0.5, 0.81, 400):
        plan = vlprune.PyramidDrop(budget=budget).plan(single(24), shape)
        mean = budget if budget > 1 else budget * 576
        spent = sum(plan.at_layers(depth))
        assert mean * depth - depth < spent <= mean * depth
        counts = list(plan.prefill.values())
        assert counts == sorted(counts, reverse=True)


def test_layers_scale_to_the_model_and_may_become_one():
    assert list(vlprune.PyramidDrop().plan(single(24), TINY).prefill) == [1, 2, 4]
    two = vlprune.ModelShape(vision_layers=4, text_layers=2, feature_layer=2, has_cls=True)
    assert vlprune.PyramidDrop(keep=(0.5, 0.25, 0.125)).plan(single(24), two).prefill == {1: 72}
    assert list(vlprune.PyramidDrop(layers=(3, 5)).plan(single(24), inside.SHAPE).prefill) == [3, 5]


def test_a_budget_that_the_first_layers_use_up_is_refused():
    """A quarter of the layers see everything."""
    with pytest.raises(vlprune.BudgetError, match="allows 145 to 576, or a fraction of 0.252"):
        vlprune.PyramidDrop(budget=0.25).plan(single(24), inside.LLAVA)
    lowest = vlprune.PyramidDrop(budget=145).plan(single(24), inside.LLAVA)
    assert lowest.prefill[8] >= 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": ()}, "ascending order"),
        ({"layers": (0, 4)}, "from 1 on"),
        ({"layers": (4, 2)}, "ascending order"),
        ({"keep": (0.5,)}, "3 numbers are wanted"),
    ],
)
def test_options_that_make_no_sense(options, told):
    with pytest.raises(vlprune.OptionError, match=told):
        vlprune.PyramidDrop(**options)


def test_layers_and_counts_that_do_not_fit_are_refused():
    with pytest.raises(vlprune.OptionError, match="layers 0 to 7"):
        vlprune.PyramidDrop(layers=(4, 8)).plan(single(24), inside.SHAPE)
    with pytest.raises(vlprune.OptionError, match="does not come back"):
        vlprune.PyramidDrop(keep=(0.25, 0.5, 0.5)).plan(single(24), inside.SHAPE)
