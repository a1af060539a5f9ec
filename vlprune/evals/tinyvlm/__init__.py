"""TinyVLM: a real LLaVA-NeXT of 2.6 million parameters, trained on SynthVQA, small enough to live in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Config, tokenizer, processor and weights in the hub's file format; any ``from_pretrained`` reads it."""


def load() -> tuple[Any, Any]:
    """The model in eval mode, float32, on the CPU, and its processor."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    model = LlavaNextForConditionalGeneration.from_pretrained(CHECKPOINT)
    return model.eval(), LlavaNextProcessor.from_pretrained(CHECKPOINT)
