"""Vision transformers of timm. Nothing of timm is imported: a model is known by its class."""

from typing import Any

from vlprune.engine.vit import Architecture, Layout, VitShape, register
from vlprune.errors import UnsupportedModelError

BLOCK = Layout("norm1", "attn", "attn.k_norm", ("ls1", "drop_path1"), ("norm2", "mlp", "ls2", "drop_path2"), mask="attn_mask")
EVA_BLOCK = Layout(
    "norm1", "attn", "attn.k_norm", ("gamma_1", "drop_path1"), ("norm2", "mlp", "gamma_2", "drop_path2"), mask="attn_mask"
)


def shape(model: Any) -> VitShape:
    cls = getattr(model, "cls_token", None) is not None
    return VitShape(model.embed_dim, model.blocks[0].attn.num_heads, model.num_prefix_tokens, cls=cls)


def without_rope(model: Any) -> VitShape:
    if getattr(model, "rope", None) is not None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} turns queries and keys by the places of their rows (rotary embeddings), and merged "
            "rows have no single place; allowed are EVA models with learned positions"
        )
    return shape(model)


register(Architecture("timm's VisionTransformer", ("timm.VisionTransformer",), ("blocks",), (BLOCK,), shape))
register(Architecture("timm's EVA", ("timm.Eva",), ("blocks",), (EVA_BLOCK,), without_rope))
