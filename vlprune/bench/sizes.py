"""Models of the size of known ones, with random weights: what they cost does not depend on what they have learned.

The facts are those of the configurations that the models were published with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from vlprune.errors import VLPruneError

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@dataclass(frozen=True)
class Scale:
    """Divides: ``width`` the heads, channels and hidden neurons, ``depth`` the layers, ``tile`` the sides of images.

    Of a model that is divided in width, the vocabulary is cut to :data:`WORDS`.
    """

    width: int = 1
    depth: int = 1
    tile: int = 1


SCALES = {"full": Scale(), "small": Scale(8, 4), "tiny": Scale(32, 8, 3)}
"""``small``: as many visual tokens as the model itself, in minutes on two cores. ``tiny``: for tests."""
WORDS = 2048


@dataclass(frozen=True)
class Text:
    """A language model of the Llama kind. ``tied``: its head is the embedding."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    words: int
    head: int = 128
    tied: bool = False

    def scaled(self, scale: Scale) -> dict[str, Any]:
        heads, kv_heads = _heads(self.heads, self.kv_heads, scale.width)
        hidden = self.hidden if scale.width == 1 else heads * self.head
        return {
            "hidden_size": hidden,
            "intermediate_size": _share(self.mlp, scale.width),
            "num_hidden_layers": _share(self.layers, scale.depth),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": self.words if scale.width == 1 else min(self.words, WORDS),
            "max_position_embeddings": 32768,
            "tie_word_embeddings": self.tied,
        }


@dataclass(frozen=True)
class Vision:
    """A vision transformer. ``image``: pixels of a tile's side, 0 where images are of any size."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    patch: int
    image: int = 0

    def scaled(self, scale: Scale) -> tuple[int, int, int, int, int]:
        """Channels, neurons, layers, heads, pixels of a tile's side."""
        heads, _ = _heads(self.heads, self.heads, scale.width)
        hidden = heads * (self.hidden // self.heads)
        layers = _share(self.layers, scale.depth)
        return hidden, _share(self.mlp, scale.width), layers, heads, self.image // scale.tile


def _share(number: int, divisor: int) -> int:
    return max(1, round(number / divisor))


def _heads(heads: int, kv_heads: int, width: int) -> tuple[int, int]:
    """Fewer heads, those of keys and values so that the others are a multiple of them."""
    kv_heads = _share(kv_heads, width)
    return max(kv_heads, round(heads / width / kv_heads) * kv_heads), kv_heads


VICUNA_7B = Text(4096, 11008, 32, 32, 32, 32064)
VICUNA_13B = Text(5120, 13824, 40, 40, 40, 32064)
MISTRAL_7B = Text(4096, 14336, 32, 32, 8, 32064)
QWEN2_7B = Text(3584, 18944, 28, 28, 4, 152064)
QWEN25_3B = Text(2048, 11008, 36, 16, 2, 151936, tied=True)
QWEN3_8B = Text(4096, 12288, 36, 32, 8, 151936)
CLIP_L = Vision(1024, 4096, 24, 16, 14, 336)
QWEN25_VISION = Vision(1280, 3420, 32, 16, 14)
QWEN3_VISION = Vision(1152, 4304, 27, 16, 16)
CROPS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Tile rows and columns that LLaVA-NeXT's pictures may have."""


@dataclass(frozen=True)
class Known:
    """``config``: of such a model at a scale. ``image``: height and width in pixels that it is measured with."""

    config: Callable[[Text, Vision, Scale], Any]
    text: Text
    vision: Vision
    image: tuple[int, int]


# ------------------------------------------------------------------ families


def _llava(text: Text, vision: Vision, scale: Scale) -> Any:
    from transformers import LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=_clip(vision, scale),
        text_config=LlamaConfig(**text.scaled(scale)),
        **_llava_rest(text, scale),
    )


def _llava_next(text: Text, vision: Vision, scale: Scale) -> Any:
    from transformers import LlamaConfig, LlavaNextConfig

    side = vision.image // scale.tile
    return LlavaNextConfig(
        vision_config=_clip(vision, scale),
        text_config=LlamaConfig(**text.scaled(scale)),
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in CROPS],
        **_llava_rest(text, scale),
    )


def _llava_rest(text: Text, scale: Scale) -> dict[str, Any]:
    return {
        "image_token_index": text.scaled(scale)["vocab_size"] - 1,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "pad_token_id": 0,
    }


def _clip(vision: Vision, scale: Scale) -> Any:
    from transformers import CLIPVisionConfig

    hidden, mlp, layers, heads, image = vision.scaled(scale)
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image,
        patch_size=vision.patch,
    )


def _qwen25_vl(text: Text, vision: Vision, scale: Scale) -> Any:
    from transformers import Qwen2_5_VLConfig

    sizes = _qwen_vision(text, vision, scale)
    # Every eighth block attends to the whole image, the last one among them.
    every = _share(8, scale.depth)
    sizes |= {"window_size": 112, "fullatt_block_indexes": list(range(every - 1, sizes["depth"], every))}
    return Qwen2_5_VLConfig(vision_config=sizes, text_config=_qwen_text(text, scale), **_qwen_tokens(text, scale))


def _qwen3_vl(text: Text, vision: Vision, scale: Scale) -> Any:
    from transformers import Qwen3VLConfig

    sizes = _qwen_vision(text, vision, scale)
    depth = sizes["depth"]
    early = sorted({min(depth - 1, round(block / scale.depth)) for block in (8, 16, 24)})
    sizes |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": early}
    given = {**_qwen_text(text, scale, [24, 20, 20], mrope_interleaved=True), "head_dim": text.head}
    return Qwen3VLConfig(vision_config=sizes, text_config=given, **_qwen_tokens(text, scale))


def _qwen_vision(text: Text, vision: Vision, scale: Scale) -> dict[str, Any]:
    hidden, mlp, layers, heads, _ = vision.scaled(scale)
    return {
        "depth": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_heads": heads,
        "out_hidden_size": text.scaled(scale)["hidden_size"],
        "patch_size": vision.patch,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
    }


def _qwen_text(text: Text, scale: Scale, sections: list[int] | None = None, **rope: Any) -> dict[str, Any]:
    parameters = {"rope_type": "default", "mrope_section": sections or [16, 24, 24], **rope}
    if VERSION >= (5, 0):
        return {**text.scaled(scale), "rope_parameters": {**parameters, "rope_theta": 1e6}}
    return {**text.scaled(scale), "rope_scaling": parameters, "rope_theta": 1e6}


def _qwen_tokens(text: Text, scale: Scale) -> dict[str, Any]:
    last = text.scaled(scale)["vocab_size"] - 1
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: last - place for place, name in enumerate(names)}


# ------------------------------------------------------------------ by name

SQUARE = (672, 672)
"""2880 visual tokens of LLaVA-NeXT, and 48 row ends."""
KNOWN = {
    "llava-1.5-7b": Known(_llava, VICUNA_7B, CLIP_L, (336, 336)),
    "llava-1.5-13b": Known(_llava, VICUNA_13B, CLIP_L, (336, 336)),
    "llava-next-7b": Known(_llava_next, VICUNA_7B, CLIP_L, SQUARE),
    "llava-next-13b": Known(_llava_next, VICUNA_13B, CLIP_L, SQUARE),
    "llava-next-mistral-7b": Known(_llava_next, MISTRAL_7B, CLIP_L, SQUARE),
    "qwen2.5-vl-3b": Known(_qwen25_vl, QWEN25_3B, QWEN25_VISION, (1344, 1344)),
    "qwen2.5-vl-7b": Known(_qwen25_vl, QWEN2_7B, QWEN25_VISION, (1344, 1344)),
    "qwen3-vl-8b": Known(_qwen3_vl, QWEN3_8B, QWEN3_VISION, (1536, 1536)),
}


@dataclass(frozen=True)
class Size:
    """A known model at a scale. ``image``: height and width in pixels that it is measured with."""

    name: str
    known: Known
    scale: Scale

    @property
    def image(self) -> tuple[int, int]:
        height, width = self.known.image
        # Whole tiles, or whole blocks of patches, so that processors need not resize.
        step = self.known.vision.image // self.scale.tile or 2 * self.known.vision.patch
        height, width = (max(step, side // self.scale.tile // step * step) for side in (height, width))
        return height, width

    def config(self) -> Any:
        return self.known.config(self.known.text, self.known.vision, self.scale)

    def build(self, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
        """A model with seeded random weights that never ends an answer by itself."""
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(self.config(), dtype=dtype, attn_implementation=attention)
        return model.eval()


def size_of(like: str, scale: str | None = None) -> Size:
    """The size that is named ``like``, at a scale of :data:`SCALES` or one written as ``8x4`` (width and depth).

    ``llava-next-small`` is short for ``llava-next-7b`` at the scale ``small``: the first model whose name begins so.
    """
    name, dash, last = like.rpartition("-")
    if dash and last in SCALES and scale is None:
        like, scale = next((known for known in KNOWN if known.startswith(f"{name}-") or known == name), like), last
    if like not in KNOWN:
        raise VLPruneError(f"--like {like!r}: known sizes are {', '.join(KNOWN)}, and each with -small or -tiny behind")
    label = like if scale in (None, "full") else f"{like} {scale}"
    return Size(label, KNOWN[like], _scale_of(scale or "full"))


def _scale_of(text: str) -> Scale:
    if text in SCALES:
        return SCALES[text]
    width, x, depth = text.partition("x")
    if not (x and width.isdecimal() and depth.isdecimal() and int(width) and int(depth)):
        raise VLPruneError(f"--scale {text!r}: allowed are {', '.join(SCALES)}, or divisors of width and depth as in 8x4")
    return Scale(int(width), int(depth))
