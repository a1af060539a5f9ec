"""Gets the model that is to be measured: by name, or of the size of a known one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlprune.bench import workload
from vlprune.bench.sizes import Size
from vlprune.bench.workload import Workload
from vlprune.errors import VLPruneError
from vlprune.evals import tinyvlm


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
