"""TinyVLM's architecture: an ordinary LLaVA-NeXT, made from configurations.

128 x 128 pixels become a thumbnail and 2 x 2 tiles of 64 x 64 pixels, each 8 x 8 patches: 320 patch tokens and 16 row
ends, so 336 visual tokens an image.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from vlprune.evals import synthvqa

PATCH = 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    "what does the sign say is name value of bar which highest there a an how many are colour left above image describe "
    "yes no field cross circle square triangle crosses circles squares triangles "
    + " ".join((*synthvqa.COLOURS, *synthvqa.KEYS))
).split()
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
    characters = [*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    words = sorted({w for word in WORDS for w in (word, word.capitalize(), f" {word}")} - set(characters))
    pieces = [(token, 0.0) for token in SPECIAL] + [(c, -4.0) for c in characters] + [(w, -2.0) for w in words]
    raw = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def processor() -> LlavaNextProcessor:
    from transformers import LlavaNextImageProcessor

    tile = {"height": synthvqa.TILE, "width": synthvqa.TILE}
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": synthvqa.TILE},
        crop_size=tile,
        image_grid_pinpoints=[[synthvqa.SIZE, synthvqa.SIZE]],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer(),
        patch_size=PATCH,
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
        "image_size": synthvqa.TILE,
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
        "max_position_embeddings": 2048,
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
        "pad_token_id": SPECIAL.index("<pad>"),
    }
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=SPECIAL.index("<image>"),
        image_grid_pinpoints=[[synthvqa.SIZE, synthvqa.SIZE]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def model(seed: int = 0) -> LlavaNextForConditionalGeneration:
    """TinyVLM with fresh weights, float32."""
    torch.manual_seed(seed)
    return LlavaNextForConditionalGeneration(config(len(tokenizer())))
