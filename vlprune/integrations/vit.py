"""Vision transformers of transformers: ViT, CLIP's and SigLIP's image towers, DINOv2 with and without registers."""

from dataclasses import replace
from typing import Any

from vlprune.engine.vit import Architecture, Layout, VitShape, register

CLIP = Layout("layer_norm1", "self_attn", "self_attn.k_proj", (), ("layer_norm2", "mlp"))
VIT = Layout("layernorm_before", "attention", "attention.k_proj", ("dropout",), ("layernorm_after", "mlp", "dropout"))
VIT_4 = Layout(  # transformers 4: the residual is added inside of `output`, which is walked around
    "layernorm_before",
    "attention.attention",
    "attention.attention.key",
    ("attention.output.dense", "attention.output.dropout"),
    ("layernorm_after", "intermediate", "output.dense", "output.dropout"),
    "head_mask",
)
DINO = Layout(
    "norm1",
    "attention",
    "attention.k_proj",
    ("layer_scale1", "drop_path"),
    ("norm2", "mlp", "layer_scale2", "drop_path"),
)
DINO_4 = Layout(
    "norm1",
    "attention.attention",
    "attention.attention.key",
    ("attention.output.dense", "attention.output.dropout", "layer_scale1", "drop_path"),
    ("norm2", "mlp", "layer_scale2", "drop_path"),
    "head_mask",
)

TOWER = ("vision_model.encoder.layers", "encoder.layers")
REGISTERS = "dinov2_with_registers"


def shape(model: Any) -> VitShape:
    """Of a model with [CLS] alone in front of its patches."""
    config = getattr(model.config, "vision_config", None) or model.config
    return VitShape(config.hidden_size, config.num_attention_heads, 1, getattr(config, "_attn_implementation", None) or "")


def without_cls(model: Any) -> VitShape:
    return replace(shape(model), prefix=0)


def with_registers(model: Any) -> VitShape:
    return replace(shape(model), prefix=1 + model.config.num_register_tokens)


def _inside(name: str, *paths: str) -> tuple[str, ...]:
    """``paths`` in the model itself, and where it is wrapped with a head."""
    return (*paths, *(f"{name}.{path}" for path in paths))


register(Architecture("ViT", ("vit",), _inside("vit", "layers", "encoder.layer"), (VIT, VIT_4), shape))
register(Architecture("CLIP", ("clip", "clip_vision_model"), TOWER, (CLIP,), shape))
register(Architecture("SigLIP", ("siglip", "siglip_vision_model"), TOWER, (CLIP,), without_cls))
register(Architecture("DINOv2", ("dinov2",), _inside("dinov2", "encoder.layer"), (DINO, DINO_4), shape))
register(
    Architecture(
        "DINOv2 with registers",
        (REGISTERS,),
        _inside(REGISTERS, "encoder.layer"),
        (DINO, DINO_4),
        with_registers,
    )
)
