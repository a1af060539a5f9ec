"""Gets the model that is to be measured: by name, or of the size of a known one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlprune.bench import workload
from vlprune.bench.sizes import Size
from vlprune.bench.workload import Workload
from vlprune.errors import VLPruneError
from vlprune.evals import tinyvlm
from vlprune.evals.tinyvlm import build, export


@dataclass(frozen=True)
class Loaded:
    """A model, and what makes a workload of it from a batch size, words of text, and pixels (height, width)."""

    name: str
    model: Any
    workload: Callable[[int, int, tuple[int, int] | None, int], Workload]


def of_size(size: Size, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A model with random weights."""
    model = size.build(device, dtype, "sdpa")

    def make(batch: int, words: int, image: tuple[int, int] | None, steps: int) -> Workload:
        return workload.of_size(size, model, batch, words, image, steps)

    return Loaded(size.name, model, make)


def by_name(name: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """TinyVLM, or a model of the hub or in a folder, with its processor."""
    model, processor = _trained(name, dtype)
    model = model.to(device=device, dtype=dtype).eval()

    def make(batch: int, words: int, image: tuple[int, int] | None, steps: int) -> Workload:
        return workload.of_processor(tinyvlm.NAMES.get(name, name), model, processor, batch, image, steps)

    return Loaded(tinyvlm.NAMES.get(name, name), model, make)


def _trained(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if name in tinyvlm.NAMES:
        return tinyvlm.load(name)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise VLPruneError(f"cannot load {name!r}: {error}") from error


# ------------------------------------------------------------------ for servers, which read a folder


class _OfSize(build.LlavaNext):
    """A LLaVA-NeXT of any size with TinyVLM's tokenizer, and pictures as its configuration says."""

    def __init__(self, config: Any):
        self.config = config

    def processor(self) -> Any:
        vision = self.config.vision_config
        made: Any = build.processor(vision.image_size, vision.patch_size, self.config.image_grid_pinpoints)
        made.tokenizer.model_max_length = self.config.text_config.max_position_embeddings
        return made


def save(size: Size, folder: Path) -> None:
    """A model with seeded random weights, its tokenizer and processor, as a folder of the hub."""
    from transformers import LlavaNextForConditionalGeneration

    config = size.config()
    if config.model_type != "llava_next":
        raise VLPruneError(f"{size.name}: only LLaVA-NeXT can be saved at a size; give another model with --model")
    config.text_config.vocab_size = len(build.tokenizer())
    config.image_token_index = build.SPECIAL.index("<image>")
    torch.manual_seed(0)
    export.export(LlavaNextForConditionalGeneration(config), folder, _OfSize(config))
