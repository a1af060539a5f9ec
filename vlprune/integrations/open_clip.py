"""Image towers of open_clip. Nothing of open_clip is imported: a model is known by its class."""

from typing import Any

from vlprune.engine.vit import Architecture, Layout, VitShape, register, register_wrapper
from vlprune.integrations.by_hand import multihead

BLOCK = Layout("ln_1", "attn", "attn", ("ls_1",), ("ln_2", "mlp", "ls_2"), mask="attn_mask", by_hand=multihead)
CUSTOM = Layout("ln_1", "attn", "attn.ln_k", ("ln_attn", "ls_1"), ("ln_2", "mlp", "ls_2"), mask="attn_mask")
"""Blocks with norms of queries and keys, of heads, or of what attention gives."""


def shape(model: Any) -> VitShape:
    transformer = model.transformer
    heads = transformer.resblocks[0].attn.num_heads
    # Before 2.25 rows came first, and nothing said so.
    return VitShape(transformer.width, heads, 1, sequence_first=not getattr(transformer, "batch_first", False))


register(
    Architecture(
        "open_clip's VisionTransformer",
        ("open_clip.VisionTransformer",),
        ("transformer.resblocks",),
        (BLOCK, CUSTOM),
        shape,
        intermediates=("forward_intermediates",),
    )
)
for name in ("CLIP", "CustomTextCLIP", "CoCa"):
    register_wrapper(f"open_clip.{name}", "visual")
register_wrapper("open_clip.TimmModel", "trunk")
