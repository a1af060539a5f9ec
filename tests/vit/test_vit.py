"""Merging inside of vision transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import vlprune
from tests import zoo
from tests.vit.matrix import FEATURES, PATCHES, close, equal, images, make_equal, traces
from tests.vit.models import BASES, CASES, build, outputs, packed

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
MULTIPLY = ("vit", "dinov2", "registers")
"""Their eager attention in transformers 4 multiplies by what it is given, instead of adding it to the logits."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("feature", FEATURES)
def test_matrix(feature, name):
    FEATURES[feature](CASES[name])


@pytest.mark.parametrize("name", BASES)
def test_eager_attention_takes_sizes_or_is_refused(name):
    model, pixels = build(name, attention="eager"), images()
    make_equal(model)
    before = outputs(model, pixels)
    for rates in ([8], [0, 18, 4]):
        if TRANSFORMERS_4 and name in MULTIPLY:
            with pytest.raises(vlprune.UnsupportedModelError, match="sdpa"):
                vlprune.apply(model, "tome", r=rates)
            continue
        vlprune.apply(model, "tome", r=rates)
        assert close(outputs(model, pixels), before)


@pytest.mark.parametrize("padding", [4, 8])
@torch.no_grad()
def test_padding_stands_for_nothing(padding):
    """Patches of images that are padded to one number."""
    model, inputs = build("siglip2"), packed(padding=padding)
    make_equal(model)
    before = model(**inputs)
    for rates in ([8], [0, 12, 8]):
        vlprune.apply(model, "tome", r=rates)
        after = model(**inputs)
        assert close([after.pooler_output], [before.pooler_output])
        assert close([after.last_hidden_state[:, :PATCHES]], [before.last_hidden_state[:, :PATCHES]])
        assert model._vlprune.run.sizes[-1].sum(1).tolist() == [PATCHES] * 2


@torch.no_grad()
def test_a_model_that_was_looked_at_or_dispatched_before_merges_all_the_same():
    from accelerate.hooks import ModelHook, add_hook_to_module

    pixels = images()
    expected = outputs(vlprune.apply(build("vit"), "tome", r=3), pixels)
    model = build("vit")
    before = outputs(model, pixels)
    model(pixel_values=pixels, output_hidden_states=True)
    blocks = model.layers if hasattr(model, "layers") else model.encoder.layer
    add_hook_to_module(blocks[1], ModelHook())
    vlprune.apply(model, "tome", r=3)
    model(pixel_values=pixels, output_hidden_states=True)
    add_hook_to_module(blocks[2], ModelHook())
    assert equal(outputs(model, pixels), expected)
    vlprune.remove(model)
    assert equal(outputs(model, pixels), before)
    blocks[0].forward = lambda *args, **kwargs: None
    with pytest.raises(vlprune.UnsupportedModelError, match="forward"):
        vlprune.apply(model, "tome")


def test_no_activations_are_kept_and_a_trained_model_can_be_copied():
    model = vlprune.apply(build("clip").train(), "tome", r=[0, 2])
    model(pixel_values=images()).last_hidden_state.sum().backward()
    assert model._vlprune.run.keys == [None] * 4
    copy.deepcopy(model)


def test_applied_puts_back_what_was_there():
    model, pixels = build("vit"), images()
    before = outputs(model, pixels)
    with vlprune.applied(model, budget=0.6):
        inside = outputs(model, pixels)
        assert vlprune.report(model).method["method"] == "tome"
        with vlprune.applied(model, "tome", r=1):
            assert not equal(outputs(model, pixels), inside)
        assert equal(outputs(model, pixels), inside)
    assert equal(outputs(model, pixels), before)
    with pytest.raises(vlprune.NotAppliedError):
        vlprune.report(model)
    with pytest.raises(vlprune.NotAppliedError):
        vlprune.remove(model)


def test_the_text_tower_stays_as_it_is():
    from transformers import CLIPConfig, CLIPModel

    from tests.vit.models import TOWERS

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**TOWERS)).eval()
    inputs = {"input_ids": torch.tensor([[1, 5, 98]]), "pixel_values": images()}
    with torch.no_grad():
        before = model(**inputs)
        vlprune.apply(model, "tome", budget=0.5)
        after = model(**inputs)
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert not torch.equal(before.image_embeds, after.image_embeds)


# ------------------------------------------------------------------ refusals: the model stays as it was


def test_methods_and_models_that_do_not_fit_are_refused_by_name():
    model = build("vit")
    found = traces(model)
    with pytest.raises(vlprune.UnsupportedMethodError, match=r"ViTModel.*tome"):
        vlprune.apply(model, "hired")
    with pytest.raises(vlprune.UnsupportedModelError, match=r"tome.*Qwen2-VL.*known are.*DINOv2"):
        vlprune.apply(zoo.build("qwen2_vl"), "tome")
    with pytest.raises(vlprune.UnsupportedModelError, match=r"Linear.*LLaVA.*on their own: .*DINOv2"):
        vlprune.apply(nn.Linear(1, 1), "tome")
    assert traces(model) == found
    assert "tome" not in vlprune.methods()
    assert "tome" in vlprune.methods("vit")


def test_a_block_that_computes_something_else_is_refused():
    """Another part, or the same parts in another order: both by the architecture's name."""
    model = build("dinov2")
    model.encoder.layer[2].extra = nn.Identity()
    with pytest.raises(vlprune.UnsupportedModelError, match=r"DINOv2.*extra"):
        vlprune.apply(model, "tome")
    del model.encoder.layer[2].extra
    block = model.encoder.layer[3]
    own = type(block).forward

    class Rescaled(type(block)):
        def forward(self, hidden_states, *args, **kwargs):
            return own(self, hidden_states, *args, **kwargs) * 1.01

    block.__class__ = Rescaled
    found = traces(model)
    with pytest.raises(vlprune.UnsupportedModelError, match=r"DINOv2.*residual layout"):
        vlprune.apply(model, "tome")
    assert traces(model) == found


def test_a_budget_below_what_halving_leaves_is_refused():
    model = vlprune.apply(build("vit"), "tome", budget=0.1)
    with pytest.raises(vlprune.BudgetError, match="half of its rows"):
        outputs(model, images())


@torch.no_grad()
def test_a_backbone_hands_out_whole_grids():
    from transformers import Dinov2Backbone, Dinov2Config

    from tests.vit.models import SIZE

    torch.manual_seed(0)
    config = Dinov2Config(**SIZE, out_features=["stage2", "stage4"])
    model, pixels = Dinov2Backbone(config).eval(), images(size=(42, 56))
    whole = model(pixels).feature_maps
    vlprune.apply(model, "tome", r=0)
    assert equal(model(pixels).feature_maps, whole)
    vlprune.apply(model, "tome", r=3)
    maps = model(pixels).feature_maps
    assert [part.shape for part in maps] == [part.shape for part in whole]
    assert [part[0].flatten(1).unique(dim=1).shape[1] for part in maps] == [48 - 6, 48 - 12]
