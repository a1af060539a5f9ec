"""What is run: a model with fixed inputs, and one measured pass of it."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vlprune
import vlprune.integrations  # registers the families
from vlprune.bench import memory
from vlprune.bench.sizes import Size
from vlprune.bench.timing import SELECTION, Recorder, beyond, covered, quiet
from vlprune.engine.family import IMAGE, Parts, family_of
from vlprune.engine.patch import patch_of
from vlprune.method import Method

BEFORE = 16
"""Tokens of text in front of an image; the others are behind it."""
PARTS = ("vision", "projector", SELECTION, "llm", "rest")
"""What a prefill is divided into; the parts add up to it."""

Preprocess = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One pass. Seconds: ``prefill``, its ``parts``, and ``decode``, each further token's. Bytes: ``cache``, ``peak``."""

    prefill: float
    parts: dict[str, float]
    decode: list[float]
    cache: int
    peak: int | None


@dataclass(eq=False)
class Workload:
    """A model and the inputs of a batch of equal prompts, as a processor gives them.

    ``preprocess``: makes the pixels anew on the host. ``steps``: tokens that are decoded.
    """

    name: str
    model: Any
    inputs: dict[str, Tensor]
    preprocess: Preprocess
    steps: int = 8
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = family_of(self.model).parts(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def batch(self) -> int:
        return self.inputs["input_ids"].shape[0]

    @property
    def length(self) -> int:
        """Tokens of a prompt, pruned or not."""
        return self.inputs["input_ids"].shape[1]

    @torch.inference_mode()
    def run(self, method: Method | None) -> Sample:
        """One prefill under a method, None for the unpatched model, and :attr:`steps` tokens after it."""
        with vlprune.applied(self.model, method) if method else contextlib.nullcontext(), quiet(self.device):
            memory.reset_peak(self.device)
            recorder = Recorder(self.device)
            with recorder.watch(self._modules()), recorder.watch_signals():
                begin = recorder.mark()
                cache = self.prefill()
                recorder.add("prefill", begin, recorder.mark())
            self._add_steps(recorder)
            held = memory.cache_bytes(cache)
            decode = self.decode(cache, self.length)
            return Sample(*_divided(recorder), decode, held, memory.peak(self.device))

    def prefill(self) -> Any:
        """Reads the prompts, gives the logits of the next token; returns the cache."""
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode(self, cache: Any, length: int) -> list[float]:
        """Seconds of each of the next tokens after ``cache``, which is ``length`` tokens long."""
        token = self.inputs["input_ids"][:, :1]
        mask = torch.ones(self.batch, length + self.steps, dtype=torch.long, device=self.device)
        recorder = Recorder(self.device)
        marks = [recorder.mark()]
        for step in range(self.steps):
            given = {"attention_mask": mask[:, : length + step + 1], **self._position(length + step)}
            self.model(input_ids=token, **given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            marks.append(recorder.mark())
        return [recorder.seconds(begin, end) for begin, end in zip(marks, marks[1:], strict=False)]

    def _position(self, place: int) -> dict[str, Tensor]:
        """Positions of a new token, which ``generate()`` gives to models whose positions have three axes."""
        if not hasattr(self.model.model, "rope_deltas"):
            return {}
        return {"position_ids": torch.full((3, self.batch, 1), place, device=self.device)}

    def peak(self, method: Method | None) -> int | None:
        """Bytes of tensors that were alive together in a prefill on a CPU; None on a GPU, whose allocator is asked instead."""
        if self.device.type == "cuda":
            return None
        known = [*self.model.parameters(), *self.model.buffers(), *self.inputs.values()]
        tensors = memory.PeakTensors(known)
        with vlprune.applied(self.model, method) if method else contextlib.nullcontext(), torch.no_grad(), tensors:
            self.prefill()
        return tensors.peak

    def preprocess_seconds(self, times: int = 5) -> list[float]:
        """What the host takes to make the pixels of the batch."""
        self.preprocess()
        found = []
        for _ in range(times):
            start = time.perf_counter()
            self.preprocess()
            found.append(time.perf_counter() - start)
        return found

    def _modules(self) -> dict[str, Any]:
        return {"vision": self.parts.vision, "projector": self.parts.projector, "llm": self.parts.text}

    def _add_steps(self, recorder: Recorder) -> None:
        """What the method itself did, as the engine's clocks have it."""
        patch = patch_of(self.model)
        if patch is None or patch.prefill is None:
            return
        for image in patch.prefill.images:
            for step in [*image.chosen.steps, *image.steps]:
                recorder.add(SELECTION, *step.clock.marks)


def _divided(recorder: Recorder) -> tuple[float, dict[str, float]]:
    """Seconds of the prefill, and of each of :data:`PARTS`: a part's own, without those of parts inside of it."""
    (whole,) = recorder.intervals("prefill")
    total, inner, parts = whole[1] - whole[0], [], {}
    # From the inside out: selection may lie in each of the others, and Qwen's projector is a part of its encoder.
    for name in (SELECTION, "projector", "vision", "llm"):
        own = recorder.intervals(name)
        parts[name] = beyond(own, inner)
        inner += own
    parts["rest"] = total - covered(inner)
    return total, {name: parts[name] for name in PARTS}


# ------------------------------------------------------------------ inputs


def of_size(size: Size, model: Any, batch: int, words: int, image: tuple[int, int] | None = None, steps: int = 8) -> Workload:
    """A workload for a model with random weights: pictures of noise, ``words`` tokens of text in a prompt."""
    pictures = [_noise(image or size.image, seed) for seed in range(batch)]
    processor = _image_processor(model.config)

    def preprocess() -> dict[str, Any]:
        return dict(processor(images=pictures, return_tensors="pt"))

    pixels = _on_device(preprocess(), model)
    layouts = family_of(model).seams[IMAGE](model, pixels)
    ids = _prompts(model, layouts[0].total, batch, words)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        inputs["mm_token_type_ids"] = (ids == _image_token(model)).long()
    return Workload(size.name, model, inputs, preprocess, steps)


def of_processor(name: str, model: Any, processor: Any, batch: int, image: tuple[int, int] | None, steps: int = 8) -> Workload:
    """A workload for a model with its processor: a picture of noise of ``image`` pixels or one of SynthVQA, and a question."""
    import dataclasses

    from vlprune.evals import synthvqa
    from vlprune.evals.runner import make_inputs

    (example,) = synthvqa.examples("test", 1)
    if image is not None:
        example = dataclasses.replace(example, image=_noise(image, 0))

    def preprocess() -> dict[str, Any]:
        return dict(make_inputs(model, processor, [example] * batch, ""))

    return Workload(name, model, preprocess(), preprocess, steps)


def _noise(size: tuple[int, int], seed: int) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def _image_token(model: Any) -> int:
    config = model.config
    return getattr(config, "image_token_id", None) or config.image_token_index


def _prompts(model: Any, visual: int, batch: int, words: int) -> Tensor:
    """Prompts ``(batch, tokens)``: some text, the image, the rest of the text."""
    text = torch.randint(3, 1000, (batch, words), generator=torch.Generator().manual_seed(0))
    image = torch.full((batch, visual), _image_token(model))
    before = min(BEFORE, words // 2)
    return torch.cat([text[:, :before], image, text[:, before:]], 1).to(model.device)


def _on_device(pixels: dict[str, Any], model: Any) -> dict[str, Tensor]:
    tensors = {name: value for name, value in pixels.items() if torch.is_tensor(value)}
    return {n: v.to(model.device, model.dtype if v.is_floating_point() else None) for n, v in tensors.items()}


def _image_processor(config: Any) -> Any:
    """The processor of images that such a model is published with."""
    vision, kind = config.vision_config, config.model_type
    side = {"shortest_edge": getattr(vision, "image_size", None)}
    if kind == "llava":
        return _processor_class("CLIPImageProcessor")(size=side, crop_size=vision.image_size)
    if kind == "llava_next":
        grids = config.image_grid_pinpoints
        return _processor_class("LlavaNextImageProcessor")(size=side, crop_size=vision.image_size, image_grid_pinpoints=grids)
    return _processor_class("Qwen2VLImageProcessor")(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)


def _processor_class(name: str) -> Any:
    """Since transformers 5 the one of that name needs torchvision, and there is another that does without."""
    import transformers
    from transformers.utils.import_utils import is_torchvision_available

    without = None if is_torchvision_available() else getattr(transformers, f"{name}Pil", None)
    return without or getattr(transformers, name)
