"""timm's vision transformers. They run where timm is installed; the library itself never imports it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import vlprune
from tests.vit import torchvision_cpu

if not torchvision_cpu.importable():
    pytest.skip("torchvision, which timm needs, is not installed", allow_module_level=True)
timm = pytest.importorskip("timm")

from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SIZE = {"img_size": 42, "patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
EVA = {**SIZE, "use_rot_pos_emb": False, "use_abs_pos_emb": True}


def distilled():
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**SIZE)


MODELS = {
    "plain": (1, lambda: VisionTransformer(**SIZE)),
    "average": (0, lambda: VisionTransformer(**SIZE, class_token=False, global_pool="avg")),
    "attention pool": (0, lambda: VisionTransformer(**SIZE, class_token=False, global_pool="map")),
    "registers": (5, lambda: VisionTransformer(**SIZE, reg_tokens=4, init_values=0.7)),
    "norms of queries and keys": (1, lambda: VisionTransformer(**SIZE, qk_norm=True, drop_path_rate=0.1)),
    "distilled": (2, distilled),
    "eva": (1, lambda: Eva(**EVA, init_values=0.6)),
    "eva rotary": (1, lambda: Eva(**{**EVA, "use_rot_pos_emb": True}, init_values=0.6)),
    "eva swiglu": (1, lambda: Eva(**EVA, swiglu_mlp=True, qkv_fused=False)),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name][1]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    return model.eval()


def images(count=2):
    return torch.randn(count, 3, 42, 42, generator=torch.Generator().manual_seed(0))


def close(left, right, rtol=1e-4):
    return (left - right).abs().max() <= rtol * right.abs().max()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_applied_removed_and_with_nothing_to_do(name):
    model, pixels = build(name), images()
    before, features = model(pixels), model.forward_features(pixels)
    keys = list(model.state_dict())
    vlprune.apply(model, "tome", r=0)
    assert torch.equal(model(pixels), before)
    vlprune.apply(model, "tome", budget=0.5)
    after = model(pixels)
    assert not torch.equal(after, before)
    assert model.forward_features(pixels).shape == features.shape
    assert list(model.state_dict()) == keys
    report = vlprune.report(model)
    assert (report.total, report.prefix, report.layer_mean) == (36, MODELS[name][0], 18)
    assert close(model(pixels[:1]), after[:1], 1e-5)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    vlprune.remove(model)
    assert torch.equal(model(pixels), before)
    for copied in copies:
        assert torch.equal(copied(pixels), after)
        assert torch.equal(vlprune.remove(copied)(pixels), before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_merging_equal_rows_changes_nothing(name, fused):
    """Also behind pools that average over rows, or attend to them."""
    model, pixels, prefix = build(name), images(), MODELS[name][0]

    def four_of_a_kind(module, args, out):
        return torch.cat([out[:, :prefix], out[:, prefix::4].repeat_interleave(4, 1)], 1)

    for block in model.blocks:
        block.attn.fused_attn = fused
    model.norm_pre.register_forward_hook(four_of_a_kind) if hasattr(model, "norm_pre") else (
        model.pos_drop.register_forward_hook(four_of_a_kind)
    )
    before = model(pixels)
    for rates in ([8], [18, 9], [0, 18, 4]):
        vlprune.apply(model, "tome", r=rates)
        assert close(model(pixels), before)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_torch_compile_without_graph_breaks(name):
    model, pixels = vlprune.apply(build(name), "tome", budget=0.5), images()
    expected = model(pixels)
    torch.compiler.reset()
    assert close(torch.compile(model, backend="eager", fullgraph=True)(pixels), expected, 1e-5)


def test_gradients_are_those_with_activation_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = vlprune.apply(build("plain"), "tome", budget=0.5).train()
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert close(*gradients, 1e-5)


def test_other_residual_layouts_are_refused_by_name():
    from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

    for block in (ParallelScalingBlock, ResPostBlock):
        with pytest.raises(vlprune.UnsupportedModelError, match=block.__name__):
            vlprune.apply(VisionTransformer(**SIZE, block_fn=block), "tome")
    for name in ("swin_tiny_patch4_window7_224", "vit_relpos_small_patch16_224"):
        model = timm.create_model(name)
        with pytest.raises(vlprune.UnsupportedModelError, match=type(model).__name__):
            vlprune.apply(model, "tome")
