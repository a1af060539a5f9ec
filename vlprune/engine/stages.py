"""Asks the method about images inside the LLM, before a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlprune.engine.devices import to_device
from vlprune.engine.family import Parts
from vlprune.engine.merging import merged
from vlprune.engine.rows import Take
from vlprune.engine.sequence import Image, Sequence
from vlprune.engine.steps import Clock, Step
from vlprune.engine.text_signals import OF_CACHE, TextSignals, resolved
from vlprune.errors import BudgetError
from vlprune.image import LayerTokens
from vlprune.method import Method, Selection
from vlprune.signals import AttentionSupport, Signal


def wanted(method: Method, parts: Parts, images: list[Image]) -> dict[int, list[Signal]]:
    """Layer of the LLM -> signals that are needed of it for these images."""
    signals = [signal for signal in method.wants(parts.shape) if signal.tower == "text"]
    hooks = sorted({layer for image in images for layer in image.chosen.plan.prefill})
    evicts = any(image.chosen.plan.cached for image in images)
    needed: dict[int, list[Signal]] = {}
    for signal in signals:
        own = hooks if signal.layer is None else [0] if hooks or evicts else []
        for hook in own:
            layer = resolved(signal, len(parts.text_layers), hook)
            if layer >= 0 and signal not in needed.setdefault(layer, []):
                needed[layer].append(signal)
    return needed


@dataclass(eq=False)
class Pass:
    """A pass through the LLM and who is asked in it.

    ``sequence``: the prompt, None while text is generated. ``drafts``: tokens at the end that are no prompt. ``signals``: what
    is measured on the way, None if nothing is.
    """

    method: Method
    parts: Parts
    sequence: Sequence | None
    drafts: int
    signals: TextSignals | None = None

    def leaving(self) -> dict[int, list[Image]]:
        """Layer -> images that lose tokens before it, as far as they have not lost them yet."""
        found: dict[int, list[Image]] = {}
        for image in [] if self.sequence is None else self.sequence.all_images():
            for layer, count in image.chosen.plan.prefill.items():
                if count < image.count or (self.method.adaptive and image.count):
                    found.setdefault(layer, []).append(image)
        return found


def prefill(now: Pass, layer: int, hidden: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Lets the method choose before ``layer``. Returns what is to be done with its hidden states ``(B, n, D)``."""
    method, sequence, signals = now.method, now.sequence, now.signals
    images = now.leaving().get(layer)
    if sequence is None or not images:
        return []
    kept: list[tuple[Image, Tensor]] = []
    changes: list[Callable[[Tensor], Tensor]] = []
    for image in images:
        clock = Clock(hidden.device)
        tokens = _layer_tokens(now, sequence, layer, hidden, image)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            selection = method.prefill(tokens)
        check(method, selection, tokens.count, image.count, f"before LLM layer {layer}")
        if selection.merge is not None:
            rows = sequence.slots(image.sample, image.places[image.alive])
            changes.append(functools.partial(_merge_rows, sample=image.sample, rows=rows, selection=selection))
        keep = to_device(selection.keep, image.alive.device)
        kept.append((image, keep))
        image.steps.append(Step("prefill", layer, image.count, image.alive[keep], clock.stop()))
    if any(keep.shape[0] < image.count for image, keep in kept):
        changes.append(Take(sequence.drop(kept)))
    if signals is not None:
        signals.forget(layer - 1, [s for s in signals.wanted.get(layer - 1, ()) if s.layer is None])
    return changes


def _layer_tokens(now: Pass, sequence: Sequence, layer: int, hidden: Tensor, image: Image) -> LayerTokens:
    signals, parts = now.signals, now.parts
    length, size = sequence.lengths[image.sample], sequence.size
    logical = None if sequence.rows is None else sequence.rows[image.sample, size - length :]
    values: dict[Signal, Tensor] = {}
    rows: dict[Signal, Tensor] = {}
    for signal in now.method.wants(parts.shape) if signals is not None else ():
        if signal.tower == "vision":
            continue
        source = resolved(signal, len(parts.text_layers), layer)
        if signals is None or (source, signal) not in signals.measured:
            continue
        values[signal] = signals.of(signal, source, image.sample, signals.slots(signal, source, image))
        if not isinstance(signal, (*OF_CACHE, AttentionSupport)):
            rows[signal] = signals.rows_of(signal, source, image.sample, logical, length)
    for tensors in (values, rows, image.notes):
        move(tensors, hidden.device)
    return LayerTokens(
        layer=layer,
        hidden=hidden[image.sample, size - length :].detach(),
        visual=(sequence.slots(image.sample, image.places[image.alive]) - (size - length)).to(hidden.device),
        positions=image.alive.to(hidden.device),
        last=length - 1 - now.drafts,
        count=image.chosen.plan.prefill[layer],
        layout=image.chosen.layout,
        shape=parts.shape,
        signals=values,
        row_signals=rows,
        notes=image.notes,
        find_text=_text_rows(sequence, image.sample, now.drafts, hidden.device),
    )


def _text_rows(sequence: Sequence, sample: int, drafts: int, device: torch.device) -> Callable[[], Tensor]:
    """Finds which of the sample's rows ``(R,)``, counted from its first one now, are text of the prompt."""
    version, filler = sequence.version, sequence.size - sequence.lengths[sample]

    def find() -> Tensor:
        rows = sequence.text_rows(drafts, version=version)[sample]
        count = max(sequence.text_counts()[sample] - drafts, 0)
        return to_device(rows[rows.shape[0] - count :] - filler, device)

    return find


def move(tensors: dict[Any, Tensor], device: torch.device) -> None:
    """Layers may lie on several devices; what a method is shown together lies on one."""
    tensors.update({name: to_device(tensor, device) for name, tensor in tensors.items()})


def check(method: Method, selection: Selection, count: int, present: int, where: str) -> None:
    kept = selection.keep.shape[-1]
    if not method.adaptive and kept != min(count, present):
        raise BudgetError(
            f"{type(method).__name__} kept {kept} visual tokens {where} where its plan says {count} of {present}; "
            "a method whose count depends on the image's content says so: adaptive = True"
        )


def _merge_rows(hidden: Tensor, sample: int, rows: Tensor, selection: Selection) -> Tensor:
    changed, rows = hidden.clone(), rows.to(hidden.device)
    changed[sample] = hidden[sample].index_copy(0, rows, merged(hidden[sample, rows], selection))
    return changed
