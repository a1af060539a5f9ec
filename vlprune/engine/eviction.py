"""Asks the method about images in the cache: what stays of each layer's entries once it has run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlprune.engine import cache as caches
from vlprune.engine.devices import to_device
from vlprune.engine.merging import merged
from vlprune.engine.rows import RowMap, right_align
from vlprune.engine.sequence import Image, Sequence
from vlprune.engine.stages import Pass, check, move
from vlprune.engine.steps import Clock, Step
from vlprune.image import CacheTokens
from vlprune.method import Merge, Selection


@dataclass(eq=False)
class Entries:
    """One image in one layer's cache. ``alive``: ascending indices ``(N,)`` of its placeholders, or ``(kv_heads, N)``.

    ``places (total,)``: logical positions of its placeholders, counted from the start of the cache. ``carry``: what the
    method wants to see again, ``(kv_heads or 1, N)`` each.
    """

    image: Image
    sample: int
    places: Tensor
    alive: Tensor
    carry: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.alive.shape[-1]

    def slots(self, row_map: RowMap | None) -> Tensor:
        """Where the entries are in the layer's cache: ``(N,)`` or ``(kv_heads, N)``."""
        logical = self.places[self.alive.to(self.places.device)]
        return logical if row_map is None else row_map.find(self.sample, logical)


@dataclass(frozen=True, eq=False)
class Held:
    """What the cache of one layer holds after a pass: keys and values in ``store``, of ``length`` logical tokens.

    ``row_map``: which of them, None for all. ``new_tokens``: how many were generated.
    """

    layer: int
    store: Any
    row_map: RowMap | None
    length: int
    new_tokens: int


def evict(now: Pass, held: Held, entries: list[Entries]) -> RowMap | None:
    """Lets the method choose what stays of ``entries``. Returns the layer's row map."""
    method, layer, device = now.method, held.layer, held.store.keys.device
    kept: list[tuple[Entries, Tensor, Tensor]] = []
    for entry in entries:
        count = entry.image.chosen.plan.cached.get(layer)
        count = None if count is None else method.left(count, held.new_tokens)
        if count is None or (count >= entry.count and not method.adaptive):
            continue
        clock = Clock(device)
        slots = entry.slots(held.row_map).to(device)
        entry.alive = entry.alive.to(device)
        with torch.no_grad():
            selection = method.evict(_cache_tokens(now, held, entry, slots, count))
        check(method, selection, count, entry.count, f"in the cache of LLM layer {layer}")
        keep = to_device(selection.keep, device)
        if selection.merge is not None:
            _merge_entries(held.store, entry.sample, slots, selection)
        kept.append((entry, slots, _pick(slots, keep)))
        before, entry.alive = entry.count, _pick(entry.alive, keep)
        entry.carry = {name: _pick(value, keep) for name, value in entry.carry.items()}
        entry.image.steps.append(Step("evict", layer, before, entry.alive, clock.stop()))
    return _rewrite(held, kept) if kept else held.row_map


def _cache_tokens(now: Pass, held: Held, entry: Entries, slots: Tensor, count: int) -> CacheTokens:
    layer, store, signals, shape = held.layer, held.store, now.signals, now.parts.shape
    heads, width = store.keys.shape[1], store.keys.shape[3]
    index = slots.expand(heads, -1)[..., None].expand(-1, -1, width)
    values = {
        signal: signals.of(signal, layer, entry.sample, slots)
        for signal in (now.method.wants(shape) if signals is not None else ())
        if signals is not None and signals.holds(signal, layer)
    }
    if signals is not None:
        values |= signals.of_layers(entry.sample)
    for tensors in (values, entry.image.notes):
        move(tensors, store.keys.device)
    return CacheTokens(
        layer=layer,
        keys=store.keys[entry.sample].gather(1, index),
        values=store.values[entry.sample].gather(1, index[..., :1].expand(-1, -1, store.values.shape[3])),
        positions=entry.alive,
        count=count,
        new_tokens=held.new_tokens,
        layout=entry.image.chosen.layout,
        shape=shape,
        signals=values,
        notes=entry.image.notes,
        carry=entry.carry,
        output=now.parts.text_output(layer),
    )


def _merge_entries(store: Any, sample: int, slots: Tensor, selection: Selection) -> None:
    """Keys and values of a sample's kept entries become those merged into them. Nothing leaves yet."""
    merge, heads = selection.merge, store.keys.shape[1]
    keep = to_device(selection.keep, slots.device).expand(heads, -1)
    if isinstance(merge, Merge):
        weight = None if merge.weight is None else to_device(merge.weight, slots.device).expand(heads, -1)
        merge = Merge(to_device(merge.target, slots.device).expand(heads, -1), weight)
    slots, head, chosen = slots.expand(heads, -1), torch.arange(heads, device=slots.device)[:, None], Selection(keep, merge)
    for name in ("keys", "values"):
        tensor = getattr(store, name)
        with torch.no_grad():
            changed = merged(tensor[sample, head, slots], chosen).to(tensor.dtype)
        place = (torch.full_like(head, sample), head, slots)
        if caches.is_static_layer(store):
            tensor.index_put_(place, changed)
        else:
            # Not in place: while a model is trained, attention has noted the tensor for its gradient.
            setattr(store, name, tensor.index_put(place, changed))


def _pick(values: Tensor, keep: Tensor) -> Tensor:
    """``values (N,)`` or ``(heads, N)`` at ``keep (T,)`` or ``(heads, T)``."""
    if values.ndim == 1 and keep.ndim == 1:
        return values[keep]
    heads = max(values.shape[0] if values.ndim == 2 else 1, keep.shape[0] if keep.ndim == 2 else 1)
    return values.expand(heads, -1).gather(1, keep.expand(heads, -1))


def _rewrite(held: Held, kept: list[tuple[Entries, Tensor, Tensor]]) -> RowMap:
    """Closes the gaps in a layer's keys and values; returns the row map of what is left.

    ``kept``: slots of an image's entries, and those of them that stay.
    """
    store, length = held.store, held.length
    row_map = held.row_map or RowMap.identity(store.keys.shape[0], length, store.keys.device)
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
    """The images of a cache. ``start``: logical tokens of the prompt. ``entries``: layer -> what it holds of them.

    ``turns``: how often the method has been asked since.
    """

    start: int
    entries: dict[int, list[Entries]] = field(default_factory=dict)
    turns: int = 0

    def note(self, layer: int, sequence: Sequence, past: int, alive: list[Tensor]) -> None:
        """A prompt behind ``past`` tokens has gone through ``layer``. ``alive``: the tokens of each image that did."""
        images = sequence.all_images()
        self.entries[layer] = [Entries(i, i.sample, i.places + past, a) for i, a in zip(images, alive, strict=True)]

    def images(self) -> list[Image]:
        return [entry.image for entry in next(iter(self.entries.values()), [])]

    def due(self, length: int, every: int | None) -> bool:
        """Whether the method is to be asked once the cache holds ``length`` logical tokens."""
        return every is not None and (length - self.start) // every > self.turns

    def evict(self, now: Pass, cache: Any, layer: int, row_map: RowMap | None, length: int) -> RowMap | None:
        """Asks the method about a layer that holds ``row_map`` of ``length`` logical tokens; returns its new row map."""
        if caches.is_sliding(cache, layer):
            return row_map
        return evict(now, Held(layer, cache.layers[layer], row_map, length, length - self.start), self.entries[layer])

    def asked(self, length: int, every: int | None) -> None:
        """The method has been asked about all layers."""
        self.turns = (length - self.start) // every if every else 0

    def select(self, samples: list[int]) -> None:
        """Reorders, repeats or drops samples of the batch."""
        for layer, entries in self.entries.items():
            self.entries[layer] = [
                replace(entry, sample=new, carry=dict(entry.carry))
                for new, old in enumerate(samples)
                for entry in entries
                if entry.sample == old
            ]
