"""The floor: what the arithmetic that is left takes without vlprune, put together from measured parts of the unpatched model.

The LLM's part is that of the unpatched language model on sequences of exactly the lengths that its layers see under a
method. The encoder's part is its measured time, cut by the share of its arithmetic that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vlprune import flops
from vlprune.bench.timing import Recorder, quiet
from vlprune.bench.workload import Workload
from vlprune.engine.patch import patch_of


class Segment(NamedTuple):
    """Layers from ``start`` to before ``end``, which see ``length`` rows of a sequence."""

    start: int
    end: int
    length: int


@dataclass(frozen=True)
class Schedule:
    """What a method leaves of a sequence: rows that each layer of the LLM sees, and entries of its cache after the prompt.

    ``encoder``: the share of the arithmetic in vision encoder and projector that is left. ``visual``, ``entering``,
    ``layer_mean`` and ``cached`` count the visual tokens of one prompt: all, those that enter the LLM, and the means over its
    layers and over their caches. ``flops`` are those of the whole prefill.
    """

    rows: tuple[int, ...]
    held: tuple[int, ...]
    encoder: float
    visual: int
    entering: float
    layer_mean: float
    cached: float
    flops: int

    @property
    def segments(self) -> list[Segment]:
        return segments(self.rows)

    @property
    def cache_length(self) -> int:
        """Entries of a layer's cache, as a mean over the layers: what a new token attends to."""
        return round(sum(self.held) / len(self.held))


def segments(rows: Sequence[int]) -> list[Segment]:
    """Neighbouring layers that see the same number of rows."""
    found: list[Segment] = []
    for layer, length in enumerate(rows):
        if found and found[-1].length == length:
            found[-1] = found[-1]._replace(end=layer + 1)
        else:
            found.append(Segment(layer, layer + 1, length))
    return found


def schedule_of(workload: Workload) -> Schedule:
    """What the method that has just run left; call it while it is applied."""
    import vlprune

    patch, report = patch_of(workload.model), cast(vlprune.Report, vlprune.report(workload.model))
    assert patch is not None
    assert patch.prefill is not None
    prefill, parts, batch = patch.prefill, workload.parts, workload.batch
    layers = len(parts.text_layers)
    choices = [image.chosen for image in prefill.images]
    before = sum(flops.vision(parts, choice.layout, choice.layout.grid) for choice in choices)
    after = sum(flops.vision(parts, choice.layout, choice.grid, choice.steps) for choice in choices)
    return Schedule(
        rows=tuple(prefill.physical or [prefill.logical] * layers),
        held=tuple(prefill.cached or [prefill.logical + prefill.past] * layers),
        encoder=after / before,
        visual=report.total // batch,
        entering=report.entering / batch,
        layer_mean=report.layer_mean / batch,
        cached=report.cached / batch,
        flops=report.flops,
    )


class TextRuns:
    """Runs the unpatched language model by itself, on the first rows of what it gets in the workload's prefill."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.given = _given(workload)

    @torch.inference_mode()
    def run(self, length: int, bounds: Sequence[int]) -> dict[int, float]:
        """Seconds from the start to each of the layers ``bounds``, on a prompt of ``length`` tokens.

        The number of layers stands for the end of the last one; -1 for the end of the whole.
        """
        parts, device = self.workload.parts, self.workload.device
        kwargs = shortened(self.given, self.workload.length, length)
        kwargs["past_key_values"] = DynamicCache(config=parts.text.config)
        with quiet(device):
            recorder = Recorder(device)
            marks: dict[int, Any] = {}
            handles = [_marking(parts.text_layers, bound, recorder, marks) for bound in bounds]
            begin = recorder.mark()
            try:
                parts.text(**kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            marks[-1] = recorder.mark()
            return {bound: recorder.seconds(begin, mark) for bound, mark in marks.items()}

    def bounds(self, schedules: Sequence[Schedule]) -> dict[int, list[int]]:
        """Length -> the layers at which a run of that length is to be marked, for all of ``schedules``."""
        layers, found = len(self.workload.parts.text_layers), {}
        for schedule in schedules:
            for start, end, length in schedule.segments:
                found.setdefault(length, {0, layers}).update((start, end))
        return {length: sorted(bounds) for length, bounds in found.items()}


def _marking(layers: Sequence[Any], bound: int, recorder: Recorder, marks: dict[int, Any]) -> Any:
    def mark(*_: Any) -> None:
        marks[bound] = recorder.mark()

    if bound == len(layers):
        return layers[-1].register_forward_hook(mark)
    return layers[bound].register_forward_pre_hook(mark)


def llm_seconds(schedule: Sequence[Segment], runs: dict[int, dict[int, float]]) -> float:
    """The floor of the LLM. ``runs``: length -> what :meth:`TextRuns.run` gave for it.

    What lies in front of the layers is that of the first length, what lies behind them that of the last.
    """
    first, last = runs[schedule[0].length], runs[schedule[-1].length]
    layers = sum(runs[length][end] - runs[length][start] for start, end, length in schedule)
    return first[0] + layers + last[-1] - last[schedule[-1].end]


@torch.inference_mode()
def decode_seconds(workload: Workload, length: int) -> list[float]:
    """Seconds of each new token of the unpatched model after a cache of ``length`` tokens."""
    with quiet(workload.device):
        return workload.decode(filled_cache(workload, length), length)


def filled_cache(workload: Workload, length: int) -> DynamicCache:
    """A cache that holds ``length`` tokens in each layer. What they are makes no difference to the time."""
    config, text = workload.parts.text.config, workload.parts.text
    cache = DynamicCache(config=config)
    shape = workload.batch, config.num_key_value_heads, length, flops.head_width(config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=workload.device, dtype=text.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


@torch.inference_mode()
def _given(workload: Workload) -> dict[str, Any]:
    """The arguments that the language model gets in the unpatched prefill."""
    found: dict[str, Any] = {}

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        found.update(kwargs)

    handle = workload.parts.text.register_forward_pre_hook(note, with_kwargs=True)
    try:
        workload.prefill()
    finally:
        handle.remove()
    return {name: value for name, value in found.items() if name not in ("past_key_values", "cache")}


def shortened(given: dict[str, Any], length: int, new: int) -> dict[str, Any]:
    """Arguments of the language model for the first ``new`` of ``length`` tokens."""
    cut = {name: _cut(value, length, new) for name, value in given.items() if name != "inputs_embeds"}
    cut["inputs_embeds"] = given["inputs_embeds"][:, :new]
    visual, features = cut.get("visual_pos_masks"), cut.get("deepstack_visual_embeds")
    if visual is not None and features is not None:
        cut["deepstack_visual_embeds"] = [layer[: int(visual.sum())] for layer in features]
    return cut


def _cut(value: Any, length: int, new: int) -> Any:
    """Tensors with every dimension of ``length`` cut to ``new``: ids, masks, positions."""
    if isinstance(value, Tensor):
        for dimension, size in enumerate(value.shape):
            if size == length:
                value = value.narrow(dimension, 0, new)
        return value
    if isinstance(value, dict):
        return {name: _cut(part, length, new) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        return [_cut(part, length, new) for part in value]
    return value
