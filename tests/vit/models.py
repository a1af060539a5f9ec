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
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 7,
}
PATCHES = 36
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
    "registers classifier": (Dinov2WithRegistersForImageClassification, lambda: Dinov2WithRegistersConfig(**SIZE)),
}
PREFIX = {"vit": 1, "clip": 1, "siglip": 0, "dinov2": 1, "registers": 5}
BASES = tuple(PREFIX)
"""One model of each architecture."""


def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options: Any) -> Any:
    """A model whose outputs really depend on every row: default initialisation would be too tame."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    made = config()
    for key, value in options.items():
        setattr(made, key, value)
    model = cls._from_config(made, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    return model.to(dtype).eval()


def images(count: int = 2, size: tuple[int, int] = (42, 42), seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: Any, pixels: Tensor, **options: Any) -> list[Tensor]:
    """All tensors that the model gives out."""
    found = model(pixel_values=pixels, **options)
    return [value for value in found.to_tuple() if torch.is_tensor(value)]
