"""Asks the method about images inside the LLM: before a layer, and about its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlprune.engine import cache as caches
from vlprune.engine.family import Parts
from vlprune.engine.merging import merged
from vlprune.engine.rows import RowMap, Take, right_align
from vlprune.engine.sequence import Image, Sequence
from vlprune.engine.steps import Clock, Step
from vlprune.engine.text_signals import TextSignals, resolved
from vlprune.errors import BudgetError
from vlprune.image import CacheTokens, LayerTokens
from vlprune.method import Method, Selection
from vlprune.signals import QueryAttention, ReceivedAttention, Signal


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


# ------------------------------------------------------------------ prefill


def asked(method: Method, sequence: Sequence, layer: int) -> list[Image]:
    """The images that lose tokens before ``layer``."""
    planned = [image for image in sequence.all_images() if layer in image.chosen.plan.prefill]
    return [image for image in planned if method.adaptive or image.chosen.plan.prefill[layer] < image.count]


def prefill(
    method: Method, parts: Parts, sequence: Sequence, signals: TextSignals | None, layer: int, hidden: Tensor, drafts: int
) -> list[Callable[[Tensor], Tensor]]:
    """Lets the method choose before ``layer``. Returns what is to be done with its hidden states ``(B, n, D)``."""
    images = asked(method, sequence, layer)
    if not images:
        return []
    kept: list[tuple[Image, Tensor]] = []
    changes: list[Callable[[Tensor], Tensor]] = []
    for image in images:
        clock = Clock(hidden.device)
        tokens = _layer_tokens(method, parts, sequence, signals, layer, hidden, image, drafts)
        with torch.no_grad():
            selection = method.prefill(tokens)
        _check(method, selection, tokens.count, image.count, f"before LLM layer {layer}")
        if selection.merge is not None:
            rows = sequence.slots(image.sample, image.places[image.alive])
            changes.append(functools.partial(_merge_rows, sample=image.sample, rows=rows, selection=selection))
        keep = selection.keep.to(image.alive.device)
        kept.append((image, keep))
        image.steps.append(Step("prefill", layer, image.count, image.alive[keep], clock.stop()))
    changes.append(Take(sequence.drop(kept)))
    if signals is not None:
        signals.forget(layer - 1, [s for s in signals.wanted.get(layer - 1, ()) if s.layer is None])
    return changes


def _layer_tokens(
    method: Method,
    parts: Parts,
    sequence: Sequence,
    signals: TextSignals | None,
    layer: int,
    hidden: Tensor,
    image: Image,
    drafts: int,
) -> LayerTokens:
    length, size = sequence.lengths[image.sample], sequence.size
    logical = None if sequence.rows is None else sequence.rows[image.sample, size - length :]
    values: dict[Signal, Tensor] = {}
    rows: dict[Signal, Tensor] = {}
    for signal in method.wants(parts.shape) if signals is not None else ():
        if signal.tower == "vision":
            continue
        source = resolved(signal, len(parts.text_layers), layer)
        if signals is None or (source, signal) not in signals.measured:
            continue
        values[signal] = signals.of(signal, source, image.sample, signals.slots(signal, source, image))
        if not isinstance(signal, (QueryAttention, ReceivedAttention)):
            rows[signal] = signals.rows_of(signal, source, image.sample, logical, length)
    for tensors in (values, rows, image.notes):
        _move(tensors, hidden.device)
    return LayerTokens(
        layer=layer,
        hidden=hidden[image.sample, size - length :].detach(),
        visual=(sequence.slots(image.sample, image.places[image.alive]) - (size - length)).to(hidden.device),
        positions=image.alive.to(hidden.device),
        last=length - 1 - drafts,
        count=image.chosen.plan.prefill[layer],
        layout=image.chosen.layout,
        shape=parts.shape,
        signals=values,
        row_signals=rows,
        notes=image.notes,
    )


def _move(tensors: dict[Any, Tensor], device: torch.device) -> None:
    """Layers may lie on several devices; what a method is shown together lies on one."""
    tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})


def _check(method: Method, selection: Selection, count: int, present: int, where: str) -> None:
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


# ------------------------------------------------------------------ evict


@dataclass(eq=False)
class Entries:
    """One image in one layer's cache. ``alive``: ascending indices ``(N,)`` of its placeholders, or ``(kv_heads, N)``.

    ``places (total,)``: logical positions of its placeholders, counted from the start of the cache.
    """

    image: Image
    sample: int
    places: Tensor
    alive: Tensor

    @property
    def count(self) -> int:
        return self.alive.shape[-1]

    def slots(self, row_map: RowMap | None) -> Tensor:
        """Where the entries are in the layer's cache: ``(N,)`` or ``(kv_heads, N)``."""
        logical = self.places[self.alive.to(self.places.device)]
        return logical if row_map is None else row_map.find(self.sample, logical)


def evict(
    method: Method,
    parts: Parts,
    entries: list[Entries],
    signals: TextSignals | None,
    cache: Any,
    layer: int,
    length: int,
    new_tokens: int,
) -> RowMap | None:
    """Lets the method choose what stays in the cache of ``layer``, of ``length`` logical tokens.

    Returns the layer's new row map, None if all stays.
    """
    store, row_map = cache.layers[layer], caches.row_map(cache, layer)
    kept: list[tuple[Entries, Tensor, Tensor]] = []
    for entry in entries:
        count = entry.image.chosen.plan.cached.get(layer)
        if count is None or (count >= entry.count and not method.adaptive):
            continue
        clock = Clock(store.keys.device)
        slots = entry.slots(row_map).to(store.keys.device)
        entry.alive = entry.alive.to(store.keys.device)
        with torch.no_grad():
            selection = method.evict(_cache_tokens(method, parts, signals, store, layer, entry, slots, count, new_tokens))
        _check(method, selection, count, entry.count, f"in the cache of LLM layer {layer}")
        kept.append((entry, slots, _pick(slots, selection.keep)))
        before, entry.alive = entry.count, _pick(entry.alive, selection.keep)
        entry.image.steps.append(Step("evict", layer, before, entry.alive, clock.stop()))
    return (
        _rewrite(store, row_map or RowMap.identity(store.keys.shape[0], length, store.keys.device), length, kept)
        if kept
        else None
    )


def _cache_tokens(
    method: Method,
    parts: Parts,
    signals: TextSignals | None,
    store: Any,
    layer: int,
    entry: Entries,
    slots: Tensor,
    count: int,
    new_tokens: int,
) -> CacheTokens:
    heads, width = store.keys.shape[1], store.keys.shape[3]
    index = slots.expand(heads, -1)[..., None].expand(-1, -1, width)
    values = {
        signal: signals.of(signal, layer, entry.sample, slots)
        for signal in (method.wants(parts.shape) if signals is not None else ())
        if signals is not None and signals.holds(signal, layer)
    }
    _move(entry.image.notes, store.keys.device)
    return CacheTokens(
        layer=layer,
        keys=store.keys[entry.sample].gather(1, index),
        values=store.values[entry.sample].gather(1, index[..., :1].expand(-1, -1, store.values.shape[3])),
        positions=entry.alive,
        count=count,
        new_tokens=new_tokens,
        layout=entry.image.chosen.layout,
        shape=parts.shape,
        signals=values,
        notes=entry.image.notes,
    )


def _pick(values: Tensor, keep: Tensor) -> Tensor:
    """``values (N,)`` or ``(heads, N)`` at ``keep (T,)`` or ``(heads, T)``."""
    if values.ndim == 1 and keep.ndim == 1:
        return values[keep]
    heads = max(values.shape[0] if values.ndim == 2 else 1, keep.shape[0] if keep.ndim == 2 else 1)
    return values.expand(heads, -1).gather(1, keep.expand(heads, -1))


def _rewrite(store: Any, row_map: RowMap, length: int, kept: list[tuple[Entries, Tensor, Tensor]]) -> RowMap:
    """Closes the gaps in a layer's keys and values; returns the row map of what is left."""
    logical = row_map.entries(length - row_map.dropped).to(store.keys.device)
    if any(stay.ndim == 2 for _, _, stay in kept):
        logical = logical.expand(-1, store.keys.shape[1], -1)
    alive = (logical >= 0).contiguous()
    gone = [0] * alive.shape[0]
    for entry, slots, stay in kept:
        heads = alive.shape[1]
        alive[entry.sample].scatter_(1, slots.expand(heads, -1), False).scatter_(1, stay.expand(heads, -1), True)
        gone[entry.sample] += slots.shape[-1] - stay.shape[-1]
    rows = right_align(alive.flatten(0, 1), alive.shape[2] - min(gone)).view(*alive.shape[:2], -1)
    caches.keep_rows(store, rows)
    kept_logical = torch.where(rows < 0, rows, logical.gather(2, rows.clamp(min=0)))
    return RowMap(kept_logical, length, row_map.filler or min(gone) < max(gone))


@dataclass(eq=False)
class Ledger:
    """The images of a cache. ``entries``: layer -> what it holds of them. ``start``: logical tokens of the prompt.

    ``turns``: how often the method has been asked since.
    """

    entries: dict[int, list[Entries]]
    start: int
    turns: int = 0

    @classmethod
    def of(cls, sequence: Sequence, past: int, alive: dict[int, list[Tensor]], length: int) -> Ledger:
        """The images of a pass. ``alive``: layer -> the tokens of each image that went through it."""
        images = sequence.all_images()
        entries = {
            layer: [Entries(i, i.sample, i.places + past, a) for i, a in zip(images, tokens, strict=True)]
            for layer, tokens in alive.items()
        }
        return cls(entries, length)

    def images(self) -> list[Image]:
        return [entry.image for entry in next(iter(self.entries.values()), [])]

    def due(self, length: int, every: int | None) -> bool:
        """Whether the method is to be asked once the cache holds ``length`` logical tokens."""
        return every is not None and (length - self.start) // every > self.turns

    def evict(self, method: Method, parts: Parts, signals: TextSignals | None, cache: Any, length: int) -> None:
        """Asks the method about all layers."""
        self.turns = (length - self.start) // method.every if method.every else 0
        row_maps = [caches.row_map(cache, layer) for layer in range(len(cache.layers))]
        for layer, entries in self.entries.items():
            if caches.is_sliding(cache, layer):
                continue
            changed = evict(method, parts, entries, signals, cache, layer, length, length - self.start)
            row_maps[layer] = changed or row_maps[layer]
        if any(row_map is not None for row_map in row_maps):
            caches.adopt(cache, row_maps)
            cache.ledger = self if method.every else None

    def select(self, samples: list[int]) -> None:
        """Reorders, repeats or drops samples of the batch."""
        for layer, entries in self.entries.items():
            self.entries[layer] = [
                replace(entry, sample=new) for new, old in enumerate(samples) for entry in entries if entry.sample == old
            ]
