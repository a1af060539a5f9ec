"""Vision transformers of timm. Nothing of timm is imported: a model is known by its class."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlprune.engine.vit import Architecture, Layout, Rotary, VitShape, register, register_wrapper
from vlprune.integrations.by_hand import eva, timm_fused, timm_rotate


def example(angles: Tensor) -> Tensor:
    """Sines and cosines side by side, each for both members of a pair."""
    return torch.cat([angles.sin().repeat_interleave(2, -1), angles.cos().repeat_interleave(2, -1)], -1)


BLOCK = Layout("norm1", "attn", "attn.k_norm", ("ls1", "drop_path1"), ("norm2", "mlp", "ls2", "drop_path2"), mask="attn_mask")
BEFORE_MASKS = replace(BLOCK, by_hand=timm_fused)
EVA_BLOCK = Layout(
    "norm1",
    "attn",
    "attn.k_norm",
    ("gamma_1", "drop_path1"),
    ("norm2", "mlp", "gamma_2", "drop_path2"),
    mask="attn_mask",
    rotary=Rotary("rope", timm_rotate, example),
)
EVA_BEFORE_NORMS = replace(EVA_BLOCK, by_hand=eva)

INTERMEDIATES = ("forward_intermediates", "get_intermediate_layers", "_intermediate_layers")


def shape(model: Any) -> VitShape:
    cls = getattr(model, "cls_token", None) is not None
    return VitShape(model.embed_dim, model.blocks[0].attn.num_heads, model.num_prefix_tokens, cls=cls)


for name, class_name, layouts in (
    ("timm's VisionTransformer", "timm.VisionTransformer", (BLOCK, BEFORE_MASKS)),
    ("timm's EVA", "timm.Eva", (EVA_BLOCK, EVA_BEFORE_NORMS)),
):
    register(Architecture(name, (class_name,), ("blocks",), layouts, shape, intermediates=INTERMEDIATES))
register_wrapper("timm.FeatureGetterNet", "model")
