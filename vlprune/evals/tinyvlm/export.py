"""Writes TinyVLM in the hub's file format, with the names that transformers 4.57, 5.x and other hosts read alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from vlprune.evals.tinyvlm.architecture import Architecture
from vlprune.evals.tinyvlm.build import LLAVA_NEXT


def export(model: nn.Module, folder: Path, architecture: Architecture = LLAVA_NEXT) -> None:
    """Config, tokenizer, processor and weights of ``model`` into ``folder``."""
    untyped: Any = model
    folder.mkdir(parents=True, exist_ok=True)
    untyped.config.save_pretrained(folder)
    untyped.generation_config.save_pretrained(folder)
    architecture.save_processor(folder)
    dtype = str(architecture.dtype).removeprefix("torch.")
    described = {"architectures": [type(model).__name__], "dtype": dtype}
    _rewrite(folder / "config.json", lambda config: architecture.hub_config({**config, **described}))
    # transformers 4.57 looks for tokenizer classes by their old name.
    renamed = {"tokenizer_class": "PreTrainedTokenizerFast", "backend": None, "extra_special_tokens": None}
    _rewrite(folder / "tokenizer_config.json", lambda config: {**config, **renamed})
    weights = {
        architecture.hub_name(name): tensor.detach().to(architecture.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes a JSON object on disk; what is None is left out."""
    values = {key: value for key, value in change(json.loads(path.read_text())).items() if value is not None}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
