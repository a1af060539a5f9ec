"""Tiny random models of every supported family, and prompts for them. A new family joins by adding itself to FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)

import vlprune

IMAGE, PAD = 90, 0
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SIZES = [(28, 56), (56, 56), (50, 28), (30, 84)]
"""Image sizes (height, width) that prompts take in turn: with and without padding, several tile grids."""


def llava(**vision: Any) -> LlavaConfig:
    return LlavaConfig(vision_config=CLIPVisionConfig(**VISION, **vision), **_shared())


def llava_siglip() -> LlavaConfig:
    shared = {**_shared(), "vision_feature_select_strategy": "full"}
    return LlavaConfig(vision_config=SiglipVisionConfig(**VISION), **shared)


def llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(vision_config=CLIPVisionConfig(**VISION), image_grid_pinpoints=PINPOINTS, **_shared())


def _shared() -> dict[str, Any]:
    return {
        "text_config": LlamaConfig(**TEXT),
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "pad_token_id": PAD,
    }


@dataclass(frozen=True)
class Entry:
    config: Callable[[], Any]
    model: Any
    tiled: bool = False
    cls: bool = True


FAMILIES: dict[str, Entry] = {
    "llava": Entry(llava, LlavaForConditionalGeneration),
    "llava_siglip": Entry(llava_siglip, LlavaForConditionalGeneration, cls=False),
    "llava_next": Entry(llava_next, LlavaNextForConditionalGeneration, tiled=True),
}

VARIANTS: dict[str, list[dict[str, Any]]] = {"hired": [{}, {"allocation": "sums", "alpha": 0.3}]}
"""Options under which a method goes through the matrices; a method that is not named goes with its defaults."""


def method_cases() -> list[tuple[str, dict[str, Any]]]:
    return [(name, options) for name in vlprune.methods() for options in VARIANTS.get(name, [{}])]


def combinations() -> list[tuple[str, str, dict[str, Any]]]:
    """Family, method and options of all that go together."""
    return [
        (family, name, options)
        for family, entry in FAMILIES.items()
        for name, options in method_cases()
        if entry.cls or not any(isinstance(s, vlprune.ClsAttention) for s in vlprune.methods()[name].needs)
    ]


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose outputs really depend on every token: default initialisation would be too tame."""
    entry = FAMILIES[family]
    config = entry.config()
    torch.manual_seed(seed)
    model = entry.model._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def prompt(
    family: str,
    images: tuple[int, ...] = (1,),
    words: tuple[int, ...] = (7,),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    side: str = "left",
) -> dict[str, Tensor]:
    """Inputs of ``len(images)`` samples: sample i has ``images[i]`` images and ``words[i]`` trailing words."""
    generator = torch.Generator().manual_seed(seed)
    sizes: list[tuple[int, int]] = []
    rows = []
    for count, length in zip(images, words, strict=True):
        row = [1, *_words(3, generator)]
        for _ in range(count):
            sizes.append(SIZES[(len(sizes) + seed) % len(SIZES)])
            row += [IMAGE] * visual_tokens(family, sizes[-1]) + _words(2, generator)
        rows.append(row + _words(length, generator))
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if sizes and FAMILIES[family].tiled:
        inputs["pixel_values"] = torch.randn(len(sizes), 5, 3, 28, 28, generator=generator).to(dtype)
        inputs["image_sizes"] = torch.tensor(sizes)
    elif sizes:
        inputs["pixel_values"] = torch.randn(len(sizes), 3, 28, 28, generator=generator).to(dtype)
    return inputs


@lru_cache
def _unpruned(family: str) -> Any:
    return build(family)


@lru_cache
def visual_tokens(family: str, size: tuple[int, int]) -> int:
    """Placeholders that the model itself wants for an image of ``size``."""
    if not FAMILIES[family].tiled:
        return 16
    model = _unpruned(family)
    features = image_features(model, {"pixel_values": torch.zeros(1, 5, 3, 28, 28), "image_sizes": torch.tensor([size])})
    return getattr(features, "pooler_output", features)[0].shape[0]


def image_features(model: Any, inputs: dict[str, Tensor]) -> Any:
    """What the model's own ``get_image_features`` gives for the images of ``inputs``."""
    arguments: dict[str, Any] = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    if VERSION < (5, 0):
        arguments["vision_feature_layer"] = model.config.vision_feature_layer
        arguments["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    return model.model.get_image_features(**arguments)


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 80, (count,), generator=generator).tolist()


SCENARIOS: dict[str, dict[str, Any]] = {
    "single": {"images": (1,), "words": (7,)},
    "batch": {"images": (1, 2, 0), "words": (7, 4, 9)},
}
"""``batch``: left padding, a different number of visual tokens in each sample, one sample without an image."""


def generate(model: Any, inputs: dict[str, Tensor], new_tokens: int = 5, **options: Any) -> Any:
    """Greedy generation with the logits of each step in the model's own dtype: ``out.raw (B, steps, vocabulary)``."""
    raw: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: raw.append(out[:, -1].detach().clone()))
    options = {"do_sample": False, "suppress_tokens": [IMAGE], **options}
    torch.manual_seed(1)
    try:
        out = model.generate(
            **{name: value.clone() for name, value in inputs.items()},
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            **options,
        )
    finally:
        handle.remove()
    out.raw = torch.stack(raw, 1) if len({len(step) for step in raw}) == 1 else None
    return out
