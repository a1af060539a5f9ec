"""FasterVLM's and VTC-CLS's choices against their definitions, with plain loops."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.between import CLIP, CONTENTS, LAYOUTS, SHAPES, filled_up, heads_mean, image, ranked, shares
from vlprune.signals import ClsAttention, MeanAttention

METHODS = {
    "fastervlm": lambda budget: vlprune.FasterVLM(budget=budget),
    "vtc-cls": lambda budget: vlprune.VTCCLS(budget=budget, layer=0),
}


def by_hand(img) -> list[int]:
    layers = [heads_mean(values) for values in img.signals.values()]
    keep = []
    for tile, (places, count) in enumerate(zip(img.layout.placeholder.tolist(), shares(img), strict=True)):
        scores = [sum(layer[tile][patch] for layer in layers) for patch in range(len(places))]
        keep += [places[patch] for patch in ranked(scores, places)[:count]]
    return filled_up(keep, img)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("content", ["random", *CONTENTS])
@pytest.mark.parametrize("budget", [1, 5, 0.3, 0.95, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_the_choice_is_the_definitions(name, layout, budget, content, shape):
    method = METHODS[name](budget)
    img = image(method, LAYOUTS[layout](), content, shape=shape)
    assert method.select(img).keep.tolist() == by_hand(img)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_number_never_brings_in_the_padding(name, bad):
    method = METHODS[name](0.9)
    img = image(method, LAYOUTS["padded above and below"]())
    for values in img.signals.values():
        values[:, :, ::2] = bad
    keep = method.select(img).keep.tolist()
    assert len(set(keep)) == img.count
    assert min(keep) >= 0


def test_the_blocks_that_are_asked_for():
    assert vlprune.FasterVLM().wants(CLIP) == (ClsAttention(2),)
    assert vlprune.FasterVLM().wants(SHAPES["no [CLS]"]) == (MeanAttention(3),)
    clip = vlprune.ModelShape(vision_layers=24, text_layers=32, feature_layer=22, has_cls=True)
    assert vlprune.VTCCLS().wants(clip) == tuple(ClsAttention(layer) for layer in range(16, 23))
    assert vlprune.VTCCLS(layer=40).wants(clip) == (ClsAttention(22),)


@pytest.mark.parametrize("layer", [-1, 0.0, 1.0, True, "16", float("nan")])
def test_vtc_cls_refuses_blocks_that_there_are_not(layer):
    with pytest.raises(vlprune.OptionError, match="allowed"):
        vlprune.VTCCLS(layer=layer)


def test_a_block_counts_as_much_as_its_attention():
    """Nothing is normalised between blocks: of three, the one with the largest differences decides."""
    method = vlprune.VTCCLS(budget=1, layer=0)
    img = image(method, LAYOUTS["one tile"](), "zeros")
    for number, values in enumerate(img.signals.values()):
        values[:, :, number] = [0.25, 0.5, 0.125][number]
    assert method.select(img).keep.tolist() == torch.tensor([0.25, 0.5, 0.125]).argmax().view(1).tolist()
