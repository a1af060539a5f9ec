"""Writes TinyVLM in the hub's file format, with the names that transformers 4.57, 5.x and other hosts read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from vlprune.evals.tinyvlm import build


def export(model: nn.Module, folder: Path) -> None:
    """Config, tokenizer, processor and float32 weights of ``model`` into ``folder``."""
    untyped: Any = model
    folder.mkdir(parents=True, exist_ok=True)
    untyped.config.save_pretrained(folder)
    untyped.generation_config.save_pretrained(folder)
    processor = build.processor()
    processor.save_pretrained(folder)
    # transformers 4.57 looks for the image processor in a file of its own, and for tokenizer classes by their old name.
    processor.image_processor.save_pretrained(folder)
    for name, changes in (
        ("config.json", {"architectures": [type(model).__name__], "dtype": "float32"}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "backend": None, "extra_special_tokens": None},
        ),
        ("preprocessor_config.json", {"image_processor_type": "LlavaNextImageProcessor"}),
    ):
        path = folder / name
        values = {**json.loads(path.read_text()), **changes}
        values = {key: value for key, value in values.items() if value is not None}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    weights = {hub_name(name): tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def hub_name(name: str) -> str:
    """The name a parameter has in checkpoints of the hub."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name
