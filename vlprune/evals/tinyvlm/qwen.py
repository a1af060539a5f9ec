"""TinyVLM-Qwen: TinyVLM's sibling of the Qwen2.5-VL family, made from configurations.

128 x 128 pixels become 32 x 32 patches of 4 x 4 pixels; blocks look within windows of 64 x 64 pixels, but for one that
sees everything; the merger joins 2 x 2 patches, so that an image is 16 x 16 = 256 visual tokens. Images of other sizes
have as many tokens as they have squares of 8 x 8 pixels.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from vlprune.evals.synthvqa import SIZE, TILE, Box
from vlprune.evals.tinyvlm import tokens
from vlprune.evals.tinyvlm.architecture import CELL, Architecture, View

PATCH = 4
MERGE = 2
FRAMES = 2
"""Frames in a patch: a still image is shown that many times."""
GRID = SIZE // (PATCH * MERGE)
SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unknown|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
)
IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "min_pixels": 32 * 32,
    "max_pixels": 4 * SIZE * SIZE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""``preprocessor_config.json``, with the keys that the hub's checkpoints have."""
ROPE = {"rope_theta": 30.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 7, 7]}}
"""Frequencies for a picture of 16 x 16 tokens and a page of text: the slowest of a row or a column turns by 0.6 over it."""


# ------------------------------------------------------------------ tokenizer and processor


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of SynthVQA, single characters for everything else."""
    made = tokens.tokenizer(SPECIAL, unknown="<|unknown|>", pad_token="<|endoftext|>", eos_token="<|im_end|>")
    made.chat_template = CHAT_TEMPLATE
    return made


def _image_processor(**settings: Any) -> Any:
    """The one that works on PIL images: under this name in transformers 5, where it needs no torchvision, and as the only
    slow one in transformers 4."""
    try:
        from transformers import Qwen2VLImageProcessorPil as Qwen2VLImageProcessor
    except ImportError:
        from transformers import Qwen2VLImageProcessor
    return Qwen2VLImageProcessor(**settings)


def _wants_token_types() -> bool:
    """From transformers 5.3 on the model is told which tokens are visual; before, it finds them itself and must not be."""
    return "mm_token_type_ids" in inspect.signature(Qwen2_5_VLModel.forward).parameters


class Processor:
    """Images and text to the inputs of a Qwen2.5-VL.

    Does for still images what ``Qwen2_5_VLProcessor`` does. That one cannot be built without a video processor, and no video
    processor without torchvision.
    """

    image_token = "<|image_pad|>"

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerFast):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token_id: int = SPECIAL.index(self.image_token)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """From what :meth:`save_pretrained` wrote."""
        settings = json.loads((Path(folder) / "preprocessor_config.json").read_text())
        settings.pop("image_processor_type")
        return cls(_image_processor(**settings), PreTrainedTokenizerFast.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Tokenizer with its chat template, and settings of the image processor, in the hub's file format."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = json.dumps(IMAGE_PROCESSOR, indent=2, sort_keys=True)
        (Path(folder) / "preprocessor_config.json").write_text(settings + "\n")

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        """The prompt of one conversation, with one placeholder an image."""
        prompt = self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        assert isinstance(prompt, str)
        return prompt

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **options)

    def __call__(
        self, images: list[Image.Image] | None = None, text: list[str] | str = "", return_tensors: str = "pt", **options: Any
    ) -> BatchFeature:
        """``images`` in the order of their placeholders in ``text``; ``options`` go to the tokenizer.

        Gives ``input_ids`` and ``attention_mask``, from transformers 5.3 on ``mm_token_type_ids`` (1 at visual tokens), and
        with images ``pixel_values (patches, 3 * 2 * 4 * 4)`` and ``image_grid_thw (images, 3)``.
        """
        prompts = [text] if isinstance(text, str) else text
        seen: dict[str, Any] = {}
        if images:
            seen = dict(self.image_processor(images=images, return_tensors=return_tensors))
            prompts = self._with_places(prompts, seen["image_grid_thw"])
        made = self.tokenizer(prompts, return_tensors=return_tensors, **options)
        if images and _wants_token_types():
            made["mm_token_type_ids"] = (made["input_ids"] == self.image_token_id).int()
        return BatchFeature({**made, **seen})

    def _with_places(self, prompts: list[str], grids: Tensor) -> list[str]:
        """Prompts with as many placeholders an image as it has visual tokens."""
        counts = iter((grids.prod(-1) // MERGE**2).tolist())
        parts = [prompt.split(self.image_token) for prompt in prompts]
        if sum(len(pieces) - 1 for pieces in parts) != len(grids):
            raise ValueError(f"{len(grids)} images for {sum(len(pieces) - 1 for pieces in parts)} placeholders")
        return [pieces[0] + "".join(self.image_token * next(counts) + piece for piece in pieces[1:]) for pieces in parts]


def processor() -> Processor:
    settings = {key: value for key, value in IMAGE_PROCESSOR.items() if key != "image_processor_type"}
    return Processor(_image_processor(**settings), tokenizer())


# ------------------------------------------------------------------ model


def config(vocab_size: int) -> Qwen2_5_VLConfig:
    vision: dict[str, Any] = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "window_size": TILE,
        "fullatt_block_indexes": [2],
        "out_hidden_size": 160,
        "initializer_range": 0.05,
    }
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": tokens.LONGEST,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": SPECIAL.index("<|endoftext|>"),
        # A copy: transformers changes it.
        **json.loads(json.dumps(ROPE)),
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL.index("<|image_pad|>"),
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """TinyVLM-Qwen with fresh weights, float32."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config(len(tokenizer())))


def pixels(images: list[Image.Image]) -> Tensor:
    """What the processor makes of square images of one size, 128 x 128 pixels or a multiple of 8: ``(patches, 96)``, the
    four patches of a token beside each other."""
    side = images[0].width // CELL
    full = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float().div_(127.5).sub_(1.0)
    cells = full.reshape(len(images), side, MERGE, PATCH, side, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    patches = cells[..., None, :, :].expand(*cells.shape[:-2], FRAMES, PATCH, PATCH)
    return patches.reshape(-1, 3 * FRAMES * PATCH * PATCH)


def _grids(images: list[Image.Image]) -> Tensor:
    return torch.tensor([[1, image.height // PATCH, image.width // PATCH] for image in images])


def _attend_at_once(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """What the encoder's attention does for each window in turn, for all at once, which must be of one size."""
    cos, sin = position_embeddings
    qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    windows = (len(cu_seqlens) - 1, -1)
    query, key, value = (part.unflatten(0, windows).transpose(1, 2) for part in (query, key, qkv[:, 2]))
    seen = F.scaled_dot_product_attention(query, key, value)
    return self.proj(seen.transpose(1, 2).reshape(hidden_states.shape))


class Qwen25VL(Architecture):
    """One view, the image itself; what the merger makes of patches is read, and its mean stands for the image."""

    views = (View(GRID),)
    visual_tokens = GRID * GRID
    before, image, after = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
    end, pad = "<|im_end|>", "<|endoftext|>"
    dtype = torch.float16

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer()

    def model(self, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
        return model(seed)

    def save_processor(self, folder: Path) -> None:
        processor().save_pretrained(folder)

    def encoder(self, model: Any) -> list[nn.Module]:
        return [model.model.visual.patch_embed, model.model.visual.blocks]

    def width(self, model: Any) -> int:
        return model.config.vision_config.out_hidden_size

    def features(self, model: Any, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        out = model.model.visual(pixels(images).to(model.device), grid_thw=_grids(images).to(model.device))
        # Before transformers 5 the encoder returned what the merger made, and nothing else.
        merged = out if isinstance(out, Tensor) else out.pooler_output
        cells = merged.unflatten(0, (len(images), -1))
        return cells, cells.mean(1)

    @contextmanager
    def training(self, model: Any) -> Iterator[None]:
        layers = [block.attn for block in model.model.visual.blocks]
        for layer in layers:
            layer.forward = MethodType(_attend_at_once, layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def inputs(self, images: list[Image.Image], ids: Tensor) -> dict[str, Tensor]:
        made = {"pixel_values": pixels(images), "image_grid_thw": _grids(images)}
        if _wants_token_types():
            made["mm_token_type_ids"] = (ids == SPECIAL.index(self.image)).int()
        return made

    def places(self, box: Box, glimpse: bool = True) -> list[int]:
        rows, columns = self.views[0].within(box)
        return [row * GRID + column for row in rows for column in columns]

    def hub_name(self, name: str) -> str:
        return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)

    def hub_config(self, config: dict[str, Any]) -> dict[str, Any]:
        text = {key: value for key, value in config["text_config"].items() if key != "rope_parameters"}
        return {**config, "text_config": {**text, **ROPE}}


QWEN25_VL = Qwen25VL()
assert PATCH * MERGE == CELL
