"""Merging inside of vision transformers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import nn

import vlprune
from tests import zoo
from tests.vit.models import BASES, MODELS, PATCHES, PREFIX, build, images, outputs

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
MULTIPLY = ("vit", "dinov2", "registers")
"""Their eager attention in transformers 4 multiplies by what it is given, instead of adding it to the logits."""


def equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def close(left, right, rtol=1e-4):
    return all((a.float() - b.float()).abs().max() <= rtol * b.float().abs().max() for a, b in zip(left, right, strict=True))


def traces(model):
    """What a patch could leave behind."""
    return [
        (name, type(module), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_to_merge_and_nothing_applied_are_bit_identical(name):
    model, pixels = build(name), images()
    before, found = outputs(model, pixels), traces(model)
    for options in ({"budget": 1.0}, {"r": 0}, {"r": []}):
        vlprune.apply(model, "tome", **options)
        assert equal(outputs(model, pixels), before)
    vlprune.apply(model, "tome", budget=0.5)
    changed = outputs(model, pixels)
    assert [a.shape for a in changed] == [b.shape for b in before]
    assert not equal(changed, before)
    vlprune.remove(model)
    assert equal(outputs(model, pixels), before)
    assert traces(model) == found


@pytest.mark.parametrize("name", BASES)
def test_the_report_says_what_was_merged(name):
    model = vlprune.apply(build(name), "tome", budget=0.5)
    outputs(model, images())
    report = vlprune.report(model)
    assert (report.total, report.prefix) == (PATCHES, PREFIX[name])
    assert sum(report.counts) == PATCHES * 4 // 2
    assert report.layer_mean == PATCHES / 2
    assert 0.4 < report.flops / report.flops_unpruned < 0.7
    for image in report.assignment:
        assert image[: report.prefix] == list(range(report.prefix))
        assert sorted(set(image)) == list(range(report.prefix + report.counts[-1]))
    assert report.to_dict()["method"]["method"] == "tome"
    assert "50.0%" in str(report)


class FourOfAKind:
    """A hook that makes every four neighbours among the patches equal, so that each source has an equal target beside it."""

    def __init__(self, prefix):
        self.prefix = prefix

    def __call__(self, module, args, out):
        front, patches = out[:, : self.prefix], out[:, self.prefix :]
        return torch.cat([front, patches[:, ::4].repeat_interleave(4, 1)], 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BASES)
def test_merging_equal_rows_changes_nothing(name, attention):
    """Proportional attention, sizes and the way back are right, if the output is that of the full sequence."""
    model, pixels = build(name, attention=attention), images()
    embeddings = next(module for path, module in model.named_modules() if path.split(".")[-1] == "embeddings")
    embeddings.register_forward_hook(FourOfAKind(PREFIX[name]))
    before = outputs(model, pixels)
    vlprune.apply(model, "tome", r=[8], proportional=False)
    assert not close(outputs(model, pixels), before, 1e-3)
    for rates in ([8], [18, 9], [0, 18, 4]):
        if attention == "eager" and TRANSFORMERS_4 and name in MULTIPLY:
            with pytest.raises(vlprune.UnsupportedModelError, match="sdpa"):
                vlprune.apply(model, "tome", r=rates)
            continue
        vlprune.apply(model, "tome", r=rates)
        assert close(outputs(model, pixels), before)


@pytest.mark.parametrize("name", BASES)
def test_an_image_alone_equals_a_row_of_a_batch(name):
    model = vlprune.apply(build(name), "tome", budget=0.4)
    pixels = images(3)
    batch = outputs(model, pixels)
    maps = vlprune.report(model).assignment
    for index in range(3):
        single = outputs(model, pixels[index : index + 1])
        assert close(single, [part[index : index + 1] for part in batch], 1e-5)
        assert vlprune.report(model).assignment == maps[index : index + 1]


@pytest.mark.parametrize("name", BASES)
def test_torch_compile_without_graph_breaks(name):
    model, pixels = vlprune.apply(build(name), "tome", budget=0.5), images()
    expected = outputs(model, pixels)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert close(outputs(compiled, pixels), expected, 1e-5)
    assert vlprune.report(compiled).layer_mean == PATCHES / 2


@pytest.mark.parametrize("name", BASES)
def test_copies_and_pickles_are_patched_models_of_their_own(name):
    model, pixels = build(name), images()
    before = outputs(model, pixels)
    vlprune.apply(model, "tome", budget=0.5)
    expected = outputs(model, pixels)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    vlprune.remove(model)
    for copied in copies:
        assert equal(outputs(copied, pixels), expected)
        assert vlprune.report(copied).layer_mean == PATCHES / 2
        vlprune.remove(copied)
        assert equal(outputs(copied, pixels), before)
        assert traces(copied) == traces(model)
    assert equal(outputs(model, pixels), before)


@pytest.mark.parametrize("name", BASES)
def test_half_precision_keeps_sizes_exact(name):
    model = vlprune.apply(build(name, torch.bfloat16), "tome", budget=0.4)
    outputs(model, images().bfloat16())
    run = model._vlprune.run
    assert run.sizes[-1].dtype == torch.float32
    assert run.sizes[-1].sum(1).tolist() == [PATCHES + PREFIX[name]] * 2
    counted = torch.stack([image.bincount() for image in run.maps[-1]])
    assert torch.equal(counted, run.sizes[-1].long())


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_hidden_states_have_a_row_for_every_patch(name):
    """Merged rows are copies of each other there; and looking changes nothing."""
    model, pixels = vlprune.apply(build(name), "tome", r=3), images()
    expected = outputs(model, pixels)
    full = PATCHES + PREFIX[name]
    found = model(pixel_values=pixels, output_hidden_states=True)
    assert [state.shape[1] for state in found.hidden_states] == [full] * 5
    distinct = [image.unique(dim=0).shape[0] for state in found.hidden_states[:4] for image in state]
    assert distinct == [full, full, full - 3, full - 3, full - 6, full - 6, full - 9, full - 9]
    assert torch.equal(found.last_hidden_state, expected[0])
    model.config.output_hidden_states = True
    assert torch.equal(model(pixel_values=pixels).hidden_states[2], found.hidden_states[2])
    model.config.output_hidden_states = False
    assert equal(outputs(model, pixels), expected)


@pytest.mark.parametrize("name", BASES)
def test_gradients_are_those_with_activation_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        model = build(name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        vlprune.apply(model.train(), "tome", budget=0.5)
        torch.manual_seed(1)
        model(pixel_values=images()).last_hidden_state.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    assert close(*gradients, 1e-5)


def test_no_activations_are_kept_and_a_trained_model_can_be_copied():
    model = vlprune.apply(build("clip").train(), "tome", r=[0, 2])
    model(pixel_values=images()).last_hidden_state.sum().backward()
    assert model._vlprune.run.keys == [None] * 4
    copy.deepcopy(model)


def test_images_of_other_sizes_get_their_own_counts():
    model = vlprune.apply(build("dinov2"), "tome", budget=0.5)
    for size in ((42, 42), (28, 56), (21, 35)):
        patches = size[0] * size[1] // 49
        out = outputs(model, images(size=size))
        assert out[0].shape[1] == 1 + patches
        assert vlprune.report(model).total == patches
        assert vlprune.report(model).layer_mean == patches * 4 // 2 / 4


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
    with pytest.raises(vlprune.UnsupportedMethodError, match="tome acts in the stage reduce"):
        vlprune.apply(zoo.build("llava"), "tome")
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
