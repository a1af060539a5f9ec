"""TinyVLM's architecture: an ordinary LLaVA-NeXT, made from configurations.

128 x 128 pixels become a thumbnail and 2 x 2 tiles of 64 x 64 pixels, each 8 x 8 patches: 320 patch tokens and 16 row
ends, so 336 visual tokens an image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from vlprune.evals.synthvqa import SIZE, TILE, Box
from vlprune.evals.tinyvlm import tokens
from vlprune.evals.tinyvlm.architecture import Architecture, View

PATCH = 8
GRID = TILE // PATCH
TILES = ((0, 0), (TILE, 0), (0, TILE), (TILE, TILE))
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '</s>\\n' }}{% endif %}"
    "{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of SynthVQA, single characters for everything else."""
    return tokens.tokenizer(
        SPECIAL,
        unknown="<unk>",
        opening=processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor(tile: int = TILE, patch: int = PATCH, grids: Sequence[Sequence[int]] = ((SIZE, SIZE),)) -> LlavaNextProcessor:
    """``tile``, ``patch``: pixels of their sides. ``grids``: heights and widths in pixels that an image may be resized to."""
    from transformers import LlavaNextImageProcessor

    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(grid) for grid in grids],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def config(vocab_size: int) -> LlavaNextConfig:
    vision: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": PATCH,
        "projection_dim": 128,
        "hidden_act": "gelu",
    }
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": tokens.LONGEST,
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
        "pad_token_id": SPECIAL.index("<pad>"),
    }
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=SPECIAL.index("<image>"),
        image_grid_pinpoints=[[SIZE, SIZE]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def model(seed: int = 0) -> LlavaNextForConditionalGeneration:
    """TinyVLM with fresh weights, float32."""
    torch.manual_seed(seed)
    return LlavaNextForConditionalGeneration(config(len(tokenizer())))


def pixels(images: list[Image.Image]) -> Tensor:
    """What the processor makes of 128 x 128 images: (images, 5, 3, 64, 64), the thumbnail first."""
    small = np.stack([np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC)) for image in images])
    full = np.stack([np.asarray(image) for image in images])
    views = [small] + [full[:, y : y + TILE, x : x + TILE] for x, y in TILES]
    stacked = torch.from_numpy(np.stack(views, 1)).permute(0, 1, 4, 2, 3)
    return stacked.float().div_(127.5).sub_(1.0)


class LlavaNext(Architecture):
    """Thumbnail and tiles; patches are read at block -2, [CLS] stands for a view."""

    views = (View(GRID, scale=TILE / SIZE), *(View(GRID, origin) for origin in TILES))
    visual_tokens = 5 * GRID * GRID + SIZE // PATCH
    before, image, after, end, pad = "<s>", "<image>", "\n", "</s>", "<pad>"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer()

    def model(self, seed: int = 0) -> LlavaNextForConditionalGeneration:
        return model(seed)

    def processor(self) -> LlavaNextProcessor:
        return processor()

    def save_processor(self, folder: Path) -> None:
        made = self.processor()
        made.save_pretrained(folder)
        # transformers 4.57 looks for the image processor in a file of its own, by its old name.
        made.image_processor.save_pretrained(folder)
        path = folder / "preprocessor_config.json"
        settings = {**json.loads(path.read_text()), "image_processor_type": "LlavaNextImageProcessor"}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def encoder(self, model: Any) -> list[nn.Module]:
        return [model.model.vision_tower]

    def width(self, model: Any) -> int:
        return model.config.vision_config.hidden_size

    def features(self, model: Any, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        values = pixels(images).flatten(0, 1).to(model.device)
        out = model.model.vision_tower(values, output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.pooler_output

    def inputs(self, images: list[Image.Image], ids: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": pixels(images), "image_sizes": torch.tensor([[SIZE, SIZE]] * len(images))}

    def places(self, box: Box, glimpse: bool = True) -> Iterator[int]:
        width = SIZE // PATCH + 1
        for view in self.views:
            rows, columns = view.within(box)
            for row in rows:
                for column in columns:
                    if view.readable:
                        down, right = view.origin[1] // PATCH + row, view.origin[0] // PATCH + column
                        yield GRID * GRID + down * width + right
                    elif glimpse:
                        yield row * GRID + column

    def hub_name(self, name: str) -> str:
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            return name.replace("language_model.", "language_model.model.", 1)
        if name.startswith("lm_head."):
            return f"language_model.{name}"
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        return name


LLAVA_NEXT = LlavaNext()
