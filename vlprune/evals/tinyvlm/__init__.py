"""TinyVLM: a real LLaVA-NeXT of 2.6 million parameters, trained on SynthVQA, small enough to live in the repository; and
its sibling TinyVLM-Qwen, a real Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Config, tokenizer, processor and weights in the hub's file format; any ``from_pretrained`` reads it."""
QWEN_CHECKPOINT = Path(__file__).parent / "checkpoint_qwen"
NAMES = {"tinyvlm": "TinyVLM", "tinyvlm-qwen": "TinyVLM-Qwen"}
"""What can be loaded, and what it is called."""


def load(name: str = "tinyvlm") -> tuple[Any, Any]:
    """The model in eval mode, float32, on the CPU, and its processor."""
    if name == "tinyvlm-qwen":
        return _load_qwen()
    if name != "tinyvlm":
        raise ValueError(f"unknown model {name!r}: there are {' and '.join(map(repr, NAMES))}")
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    model = LlavaNextForConditionalGeneration.from_pretrained(CHECKPOINT)
    return model.eval(), LlavaNextProcessor.from_pretrained(CHECKPOINT)


def _load_qwen() -> tuple[Any, Any]:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vlprune.evals.tinyvlm.qwen import Processor

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(QWEN_CHECKPOINT, dtype=torch.float32)
    return model.eval(), Processor.from_pretrained(QWEN_CHECKPOINT)
