"""Vision transformers of timm and open_clip. They run where both are installed; the library itself never imports them.

``make test`` has them in an environment of their own, ``make test-versions`` in some more. What a version does not have yet is
no case there.
"""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch

import vlprune
from tests.vit import torchvision_cpu
from tests.vit.matrix import FEATURES, Case, close, equal, images, strong, tensors

if not torchvision_cpu.importable():
    pytest.skip("torchvision, which timm needs, is not installed", allow_module_level=True)
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

from open_clip.transformer import VisionTransformer as OpenClip  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SIZE = {"img_size": 42, "patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
LEARNED = {**SIZE, "use_rot_pos_emb": False, "use_abs_pos_emb": True}
ROTARY = {**SIZE, "use_rot_pos_emb": True, "init_values": 0.6}
TOWER = {"image_size": 42, "patch_size": 7, "width": 32, "layers": 4, "heads": 4, "mlp_ratio": 2.0, "output_dim": 16}
TEXT = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
POOLER = {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 4}
NORMS = {"qk_norm": True, "scale_attn": True, "scale_fc": True}


def clip():
    vision = {"image_size": 42, "patch_size": 7, "width": 32, "layers": 4, "head_width": 8}
    return open_clip.CLIP(16, vision, TEXT)


def with_trunk():
    """open_clip's wrapper around a model of timm."""
    from open_clip.timm_model import TimmModel

    model = TimmModel("vit_tiny_patch16_224", 16, pool="avg")
    model.trunk = VisionTransformer(**{**SIZE, "num_classes": 0}, global_pool="avg")
    model.head = torch.nn.Linear(32, 16)
    return model


MODELS = {
    "plain": (1, VisionTransformer, SIZE),
    "average": (0, VisionTransformer, {**SIZE, "class_token": False, "global_pool": "avg"}),
    "average beside [CLS]": (1, VisionTransformer, {**SIZE, "global_pool": "avg", "init_values": 0.7}),
    "maximum": (1, VisionTransformer, {**SIZE, "global_pool": "max", "reg_tokens": 0}),
    "average and maximum": (1, VisionTransformer, {**SIZE, "global_pool": "avgmax", "reg_tokens": 0}),
    "attention pool": (0, VisionTransformer, {**SIZE, "class_token": False, "global_pool": "map", "reg_tokens": 0}),
    "registers": (5, VisionTransformer, {**SIZE, "reg_tokens": 4, "init_values": 0.7, "dynamic_img_size": True}),
    "norms of queries and keys": (1, VisionTransformer, {**SIZE, "qk_norm": True, "drop_path_rate": 0.1}),
    "norm of attention": (1, VisionTransformer, {**SIZE, "scale_attn_norm": True}),
    "distilled": (2, VisionTransformerDistilled, SIZE),
    "eva": (1, Eva, {**LEARNED, "init_values": 0.6}),
    "eva swiglu": (1, Eva, {**LEARNED, "swiglu_mlp": True, "qkv_fused": False}),
    "eva rotary": (1, Eva, ROTARY),
    "eva rotary, unfused": (1, Eva, {**ROTARY, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True}),
    "eva rotary, by halves": (5, Eva, {**ROTARY, "rope_rotate_half": True, "num_reg_tokens": 4, "rope_type": "dinov3"}),
    "eva rotary, by heads": (1, Eva, {**ROTARY, "rope_type": "mixed"}),
    "eva rotary, shared keys": (1, Eva, {**ROTARY, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2}),
    "open_clip": (1, OpenClip, TOWER),
    "open_clip average": (1, OpenClip, {**TOWER, "ls_init_value": 0.7, "pool_type": "avg", "output_tokens": True}),
    "open_clip attention pool": (1, OpenClip, {**TOWER, **POOLER}),
    "open_clip norms": (1, OpenClip, {**TOWER, **NORMS}),
    "open_clip heads": (1, OpenClip, {**TOWER, "qk_norm": True, "scale_heads": True, "scale_attn_inner": True}),
    "open_clip CLIP": (1, clip, {}),
    "open_clip trunk": (1, with_trunk, {}),
}
COMPILED = ("plain", "eva rotary", "open_clip")
ANY_SIZE = ("registers",)


def available(make, options):
    known = {name for cls in getattr(make, "__mro__", [make]) for name in inspect.signature(cls).parameters}
    return known.issuperset(options)


def adds_masks(make):
    """Whether attention as a product of matrices adds the mask. Where it does not, there is the fused kernel alone."""
    return hasattr(timm.models.eva if make is Eva else timm.models.vision_transformer, "maybe_add_mask")


def unfused(model):
    """Attention as a product of matrices."""
    for module in model.modules():
        if hasattr(module, "fused_attn") and "attn_mask" in inspect.signature(type(module).forward).parameters:
            module.fused_attn = False


def forward_features(model, inputs):
    return model.forward_features(inputs["x"])


def forward_intermediates(model, inputs):
    return model.forward_intermediates(inputs["x"], intermediates_only=True)


def intermediate_layers(model, inputs):
    return model.get_intermediate_layers(inputs["x"], n=2)


def case(name):
    prefix, make, options = MODELS[name]
    own = make in (VisionTransformer, VisionTransformerDistilled, Eva, OpenClip)
    of_timm = own and make is not OpenClip
    return Case(
        make=partial(make, **options),
        prefix=prefix,
        inputs=(lambda count=2, **size: {"image": images(count, **size)}) if name == "open_clip CLIP" else Case.inputs,
        variants=(lambda model: None, unfused) if of_timm and adds_masks(make) else Case.variants,
        sizes=((28, 56), (21, 35)) if name in ANY_SIZE else (),
        features=(forward_features,) if of_timm else (),
        between=tuple(
            look
            for look, method in (
                (forward_intermediates, "forward_intermediates"),
                (intermediate_layers, "get_intermediate_layers"),
            )
            if own and hasattr(make, method)
        ),
        compiled=name in COMPILED,
        hides_values=name in ("open_clip norms", "open_clip heads")
        or (make is Eva and options.get("qkv_fused", True) and available(timm.models.eva.EvaAttention, ["qk_norm"])),
        plain_output=name not in ("norm of attention", "open_clip heads"),
        # timm's own came for this: PyTorch's refuses by default what EVA passes to its blocks.
        checkpoints=make is not Eva or timm.models._manipulate.checkpoint.__module__.startswith("timm"),
    )


CASES = {name: case(name) for name, (_, make, options) in MODELS.items() if available(make, options)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("feature", FEATURES)
def test_matrix(feature, name):
    FEATURES[feature](CASES[name])


def test_other_residual_layouts_are_refused_by_name():
    from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

    for block in (ParallelScalingBlock, ResPostBlock):
        with pytest.raises(vlprune.UnsupportedModelError, match=block.__name__):
            vlprune.apply(VisionTransformer(**SIZE, block_fn=block), "tome")
    with pytest.raises(vlprune.UnsupportedModelError, match=r"EvaBlockPostNorm.*EVA"):
        vlprune.apply(Eva(**SIZE, use_post_norm=True), "tome")


def test_unfused_attention_that_does_not_add_masks_is_refused():
    """EVA's, before it had norms, and in the first version with them, where a mask says yes or no."""
    model = strong(Eva(**LEARNED))
    unfused(model)
    if adds_masks(Eva):
        vlprune.apply(model, "tome")
        return
    with pytest.raises(vlprune.UnsupportedModelError, match="EVA.*(does not add the mask|residual layout)"):
        vlprune.apply(model, "tome")


def test_windows_and_relative_positions_are_refused_by_name():
    for name, small in {
        "swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (2, 4)},
        "vit_relpos_small_patch16_224": {"depth": 1},
        "beit_base_patch16_224": {"depth": 1},
        "samvit_base_patch16": {"depth": 1},
    }.items():
        if timm.is_model(name):
            model = timm.create_model(name, **small)
            with pytest.raises(vlprune.UnsupportedModelError, match=type(model).__name__):
                vlprune.apply(model, "tome")


@torch.no_grad()
def test_a_tower_in_a_model_is_that_tower_alone():
    """CLIP with both towers, a trunk of timm, and a part of a model that is applied to already."""
    for make, image, path in ((clip, "image", "visual"), (with_trunk, "x", "trunk")):
        torch.manual_seed(0)
        model = strong(make())
        tower = model.get_submodule(path)
        before = tower(images())
        vlprune.apply(model, "tome", budget=0.5)
        inside = tower(images())
        with pytest.raises(vlprune.UnsupportedModelError, match="part"):
            vlprune.apply(tower, "tome")
        vlprune.remove(model)
        vlprune.apply(tower, "tome", budget=0.5)
        assert torch.equal(tower(images()), inside)
        assert not close([inside], [before], 1e-3)
        assert tensors(model(**{image: images()}))
        with pytest.raises(vlprune.UnsupportedModelError, match="part"):
            vlprune.apply(model, "tome")
        vlprune.remove(tower)
        assert torch.equal(tower(images()), before)


@torch.no_grad()
def test_the_text_tower_stays_as_it_is():
    torch.manual_seed(0)
    model, text = strong(clip()), torch.tensor([[1, 2, 3, 8]])
    before = model.encode_text(text)
    vlprune.apply(model, "tome", budget=0.5)
    assert torch.equal(model.encode_text(text), before)


@torch.no_grad()
def test_timm_hands_out_features_of_blocks():
    if not hasattr(VisionTransformer, "forward_intermediates"):
        return
    from timm.models._features import FeatureGetterNet

    torch.manual_seed(0)
    model = FeatureGetterNet(strong(VisionTransformer(**SIZE)), out_indices=(1, 3))
    whole = model(images())
    vlprune.apply(model, "tome", r=0)
    assert equal(model(images()), whole)
    vlprune.apply(model, "tome", r=3)
    assert [part.shape for part in model(images())] == [part.shape for part in whole]
