"""Tiny random vision transformers, and images for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaForImageClassification,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from tests.vit.matrix import PATCHES, Case, images, strong, tensors

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 7,
}
PACKED = {**{k: v for k, v in SIZE.items() if k != "image_size"}, "num_patches": PATCHES}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
TOWERS = {"vision_config": SIZE, "text_config": TEXT}
"""A vision transformer with its text tower."""

MODELS: dict[str, tuple[Any, Any]] = {
    "vit": (ViTModel, lambda: ViTConfig(**SIZE)),
    "vit classifier": (ViTForImageClassification, lambda: ViTConfig(**SIZE)),
    "clip": (CLIPVisionModel, lambda: CLIPVisionConfig(**SIZE)),
    "clip projected": (CLIPVisionModelWithProjection, lambda: CLIPVisionConfig(**SIZE)),
    "clip classifier": (CLIPForImageClassification, lambda: CLIPConfig(**TOWERS)),
    "siglip": (SiglipVisionModel, lambda: SiglipVisionConfig(**SIZE)),
    "siglip classifier": (SiglipForImageClassification, lambda: SiglipConfig(**TOWERS)),
    "dinov2": (Dinov2Model, lambda: Dinov2Config(**SIZE)),
    "dinov2 swiglu": (Dinov2Model, lambda: Dinov2Config(**SIZE, use_swiglu_ffn=True, drop_path_rate=0.1)),
    "dinov2 classifier": (Dinov2ForImageClassification, lambda: Dinov2Config(**SIZE)),
    "registers": (Dinov2WithRegistersModel, lambda: Dinov2WithRegistersConfig(**SIZE)),
    "dinov3": (DINOv3ViTModel, lambda: DINOv3ViTConfig(**SIZE, num_register_tokens=4)),
    "dinov3 gated": (DINOv3ViTModel, lambda: DINOv3ViTConfig(**SIZE, use_gated_mlp=True, drop_path_rate=0.1)),
    "siglip2": (Siglip2VisionModel, lambda: Siglip2VisionConfig(**PACKED)),
    "deit classifier": (DeiTForImageClassificationWithTeacher, lambda: DeiTConfig(**SIZE)),
    "vit masked": (ViTForMaskedImageModeling, lambda: ViTConfig(**SIZE, encoder_stride=7)),
    "msn classifier": (ViTMSNForImageClassification, lambda: ViTMSNConfig(**SIZE)),
    "ijepa classifier": (IJepaForImageClassification, lambda: IJepaConfig(**SIZE)),
    "metaclip2": (MetaClip2VisionModel, lambda: MetaClip2VisionConfig(**SIZE)),
    "registers classifier": (Dinov2WithRegistersForImageClassification, lambda: Dinov2WithRegistersConfig(**SIZE)),
}
PREFIX = {"vit": 1, "clip": 1, "siglip": 0, "dinov2": 1, "registers": 5}
BASES = tuple(PREFIX)
"""One model of each architecture."""


def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options: Any) -> Any:
    cls, config = MODELS[name]
    torch.manual_seed(0)
    made = config()
    for key, value in options.items():
        setattr(made, key, value)
    return strong(cls._from_config(made, attn_implementation=attention)).to(dtype)


@torch.no_grad()
def outputs(model: Any, pixels: Tensor, **options: Any) -> list[Tensor]:
    return tensors(model(pixel_values=pixels, **options))


# ------------------------------------------------------------------ cases of the matrix


def pixels(count: int = 2, **options: Any) -> dict[str, Any]:
    return {"pixel_values": images(count, **options)}


def packed(count: int = 2, padding: int = 0) -> dict[str, Any]:
    """Patches in a row as SigLIP 2 wants them, of images of 6 x 6, some padding behind."""
    values = torch.randn(count, PATCHES, 3 * 49, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(count, PATCHES, dtype=torch.int64)
    return {
        "pixel_values": torch.cat([values, values.new_zeros(count, padding, 3 * 49)], 1),
        "pixel_attention_mask": torch.cat([valid, valid.new_zeros(count, padding)], 1),
        "spatial_shapes": torch.tensor([[6, 6]] * count),
    }


def hidden_states(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs, output_hidden_states=True).hidden_states


PREFIXES = {**PREFIX, "dinov3": 5, "siglip2": 0, "deit": 2, "msn": 1, "ijepa": 0, "metaclip2": 1}
WITHOUT_REGISTERS = ("dinov3 gated",)
ANY_SIZE = ((28, 56), (21, 35))
CASES = {
    name: Case(
        make=lambda name=name: build(name),
        prefix=1 if name in WITHOUT_REGISTERS else PREFIXES[name.split()[0]],
        inputs=packed if name == "siglip2" else pixels,
        sizes=ANY_SIZE if name.startswith(("dino", "registers")) else (),
        between=(hidden_states,),
        compiled=name in ("clip", "registers", "dinov3"),
    )
    for name in MODELS
}
