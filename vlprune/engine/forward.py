"""One pass through the language model: what was found at its layers, and what these are given in physical rows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlprune.engine import cache as caches
from vlprune.engine import masks
from vlprune.engine.eviction import Ledger
from vlprune.engine.rows import RowMap, take, take_tables
from vlprune.engine.sequence import Image, Sequence
from vlprune.engine.stages import Pass


@dataclass(eq=False)
class Prefill:
    """What the last forward with images was like; :mod:`vlprune.report` reads it.

    ``physical``: rows of a sequence at each layer, ``held``: entries of each layer's cache before, ``cached``: afterwards;
    ``logical`` and ``past`` count every token.
    """

    images: list[Image]
    batch: int
    logical: int
    past: int
    physical: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Passed:
    """What happened before one layer: ``changes`` of the hidden states, in order, then ``rows (B, n)`` as they were in it.

    Kept, since checkpointing runs the layers again during backward. ``alive``: each image's tokens. ``row_map``: of the
    layer's cache once the layer has run, ``left``: after eviction.
    """

    changes: list[Callable[[Tensor], Tensor]]
    rows: Tensor | None
    version: int
    filler: bool
    alive: list[Tensor]
    row_map: RowMap | None = None
    left: RowMap | None = None


@dataclass(eq=False)
class Forward:
    """One pass through the text model, and what its layers are given: rotary tables, positions and masks in physical rows.

    ``now``: what the method's stages are told of it. ``mask``: as the text model was given it. ``old``: the row map of each
    layer's cache before the pass, ``group``: a number for each of them. ``ledger``: the images whose entries the method may
    evict, None if it is not asked. ``passed``: what was found at the layers so far, ``finished``: how many of them need
    nothing any more that was measured in them.
    """

    batch: int
    length: int
    past: int
    cache: Any
    attention: str
    now: Pass
    mask: Any
    old: list[RowMap | None]
    group: list[int]
    types: Listing[str] | None
    ledger: Ledger | None = None
    passed: dict[int, Passed] = field(default_factory=dict)
    finished: int = 0
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def sequence(self) -> Sequence | None:
        """The prompt under way, None where nothing can leave."""
        return self.now.sequence

    @property
    def flash(self) -> bool:
        return "flash" in self.attention

    @property
    def ends(self) -> int:
        """Logical tokens after the pass."""
        return self.past + self.length

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """Layers that hold the same tokens share what the first one computed."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def kind(self, layer: int) -> tuple[int, int, str]:
        """What layers have in common that share rows, columns and masks."""
        return self.group[layer], self.passed[layer].version, self.types[layer] if self.types else ""

    def untouched(self, layer: int, kwargs: dict[str, Any]) -> bool:
        """Whether ``layer`` takes ``kwargs`` as they are: so do most steps of decoding, where each microsecond counts."""
        if self.sequence is not None or self.ledger is not None:
            return False
        if kwargs.get("attention_mask") is not None or kwargs.get("cache_position") is not None:
            return False
        old = self.old[layer]
        return old is None or not (old.filler or self.flash)

    def held(self, layer: int) -> int:
        """Physical entries of the layer's cache before the pass."""
        if self.cache is not None and caches.is_sliding(self.cache, layer):
            return caches.stored(self.cache, layer)
        old = self.old[layer]
        return self.past - (0 if old is None else old.dropped)

    def padding(self, mask: Any) -> Tensor | None:
        """Which of the new tokens are padding ``(B, length)``, None for none. ``mask``: what the first layer is given."""
        given = self.mask
        if mask is None and torch.is_tensor(given) and given.ndim == 2 and (self.flash or self.attention == "sdpa"):
            # transformers has read the mask for these kernels, and leaves it out where it hides nothing.
            return None
        return masks.padding(given, self.past, self.length, self.batch)

    def row_map(self, layer: int, device: torch.device) -> RowMap | None:
        """What the layer's cache holds once the layer has run, None for every token."""
        old, passed = self.old[layer], self.passed[layer]
        if passed.rows is None:
            return old

        def extended() -> RowMap:
            head = old or RowMap.identity(self.batch, self.past, device)
            return head.extended(passed.rows, self.past, self.length, passed.filler)

        return self.once(("map", *self.kind(layer)[:2]), extended)

    def visual(self, layer: int) -> Tensor:
        """Which rows of a prompt are visual in ``layer``: ``(B, n, 1)`` bool."""
        sequence, rows = self.sequence, self.passed[layer].rows
        assert sequence is not None
        if rows is None:
            return sequence.visual[..., None]
        return self.once(("visual", *self.kind(layer)), lambda: sequence.visual.gather(1, rows.clamp(min=0))[..., None])

    def translate(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a decoder layer, in physical rows and columns."""
        passed = self.passed[layer]
        rows, changed = passed.rows, dict(kwargs)
        if self.sequence is not None and self.flash and "position_ids" in kwargs:
            # Positions of visual tokens have gaps, which look like packed sequences to flash attention.
            changed["position_ids"] = None
        if passed.row_map is None:
            return changed
        kind = self.kind(layer)
        if rows is not None:
            for name in [n for n in kwargs if n.startswith("position_embeddings") and kwargs[n] is not None]:
                tables = kwargs[name]
                changed[name] = self.once((name, kind), lambda tables=tables: take_tables(tables, rows))
            ids = changed.get("position_ids")
            if ids is not None:
                changed["position_ids"] = self.once(("ids", kind), lambda: take(ids, rows, 1))
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = self._cache_position(layer, rows, kwargs["cache_position"])
        changed["attention_mask"] = self.once(("mask", kind), lambda: self._mask(layer, kwargs.get("attention_mask")))
        return changed

    def _mask(self, layer: int, mask: Any) -> Any:
        cache, passed = self.cache, self.passed[layer]
        assert passed.row_map is not None
        slots = caches.slots(cache) if cache is not None and caches.is_static(cache) else None
        stored = caches.stored(cache, layer) if cache is not None and caches.is_sliding(cache, layer) else None
        return masks.physical(
            mask, masks.Layer(passed.row_map, passed.rows, self.past, self.length, slots, stored, self.flash)
        )

    def _cache_position(self, layer: int, rows: Tensor | None, logical: Tensor) -> Tensor:
        """Slots that this pass writes to (transformers before 5.4 tells the layers)."""
        old = self.old[layer]
        if rows is None:
            return logical if old is None else logical - old.shift
        return torch.arange(rows.shape[1], device=logical.device) + self.held(layer)
