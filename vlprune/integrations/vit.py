"""Vision transformers of transformers: ViT, CLIP's and SigLIP's image towers, DINOv2 with and without registers."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from vlprune.engine.vit import Architecture, Layout, Rotary, VitShape, register
from vlprune.integrations.by_hand import halves_rotate

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


def example(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each for both members of a pair."""
    return angles.cos().tile(2), angles.sin().tile(2)


DINO_ROTARY = replace(DINO, rotary=Rotary("position_embeddings", halves_rotate, example))
DINO_4 = Layout(
    "norm1",
    "attention.attention",
    "attention.attention.key",
    ("attention.output.dense", "attention.output.dropout", "layer_scale1", "drop_path"),
    ("norm2", "mlp", "layer_scale2", "drop_path"),
    "head_mask",
)

INTERNVL = Layout(
    "layernorm_before",
    "attention",
    "attention.k_norm",
    ("lambda_1",),
    ("layernorm_after", "mlp", "dropout", "lambda_2"),
)

TOWER = ("vision_model.encoder.layers", "encoder.layers")
REGISTERS = "dinov2_with_registers"


def shape(model: Any) -> VitShape:
    """Of a model with [CLS] alone in front of its patches."""
    config = getattr(model.config, "vision_config", None) or model.config
    return VitShape(config.hidden_size, config.num_attention_heads, 1, getattr(config, "_attn_implementation", None) or "")


def without_cls(model: Any) -> VitShape:
    return replace(shape(model), prefix=0)


def padded(model: Any) -> VitShape:
    return replace(shape(model), prefix=0, padding=True)


def distilled(model: Any) -> VitShape:
    return replace(shape(model), prefix=2)


def with_registers(model: Any) -> VitShape:
    return replace(shape(model), prefix=1 + model.config.num_register_tokens)


def _inside(name: str, *paths: str) -> tuple[str, ...]:
    """``paths`` in the model itself, and where it is wrapped with a head."""
    return (*paths, *(f"{name}.{path}" for path in paths))


VITS = (VIT, VIT_4)
DINOS = (DINO, DINO_4)
for name, model_types, blocks, layouts, of in (
    ("ViT", ("vit",), _inside("vit", "layers", "encoder.layer"), VITS, shape),
    ("DeiT", ("deit",), _inside("deit", "layers", "encoder.layer"), VITS, distilled),
    ("ViT-MSN", ("vit_msn",), _inside("vit", "layers", "encoder.layer"), VITS, shape),
    ("I-JEPA", ("ijepa",), _inside("ijepa", "layers", "encoder.layer"), VITS, without_cls),
    ("CLIP", ("clip", "clip_vision_model"), TOWER, (CLIP,), shape),
    ("MetaCLIP 2", ("metaclip_2", "metaclip_2_vision_model"), TOWER, (CLIP,), shape),
    ("SigLIP", ("siglip", "siglip_vision_model"), TOWER, (CLIP,), without_cls),
    ("SigLIP 2", ("siglip2", "siglip2_vision_model"), TOWER, (CLIP,), padded),
    ("InternVL's encoder", ("internvl_vision",), ("encoder.layer",), (INTERNVL,), shape),
    ("DINOv2", ("dinov2",), _inside("dinov2", "encoder.layer"), DINOS, shape),
    ("DINOv2 with registers", (REGISTERS,), _inside(REGISTERS, "encoder.layer"), DINOS, with_registers),
    ("DINOv3", ("dinov3_vit",), _inside("dinov3_vit", "model.layer", "layer"), (DINO_ROTARY,), with_registers),
):
    register(Architecture(name, model_types, blocks, layouts, of))
