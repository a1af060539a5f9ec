"""Vision encoders that nothing is removed from: which rows are a visual token's, and the oracle of the stage ``encode``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlprune.integrations  # noqa: F401  (registers the families)
from vlprune.engine.family import Parts, family_of


def parts_of(model: Any) -> Parts:
    return family_of(model).parts(model)


def token_rows(parts: Any, layout: Any, arguments: dict[str, Any], first: int) -> Tensor:
    """Rows ``(tiles, tokens, k)`` of an image's visual tokens among all rows of the encoder; its own begin at ``first``."""
    family, model = parts.family, parts.model
    groups = family.groups(model, layout.grid)
    tile = torch.arange(layout.tiles)[:, None, None]
    rows = first + tile * (groups.numel() + parts.prefix) + parts.prefix + groups
    if family.order is None:
        return rows
    place = family.order(model, arguments).tolist().index
    each = groups.shape[1]
    return torch.tensor([place(row // each) * each + row % each for row in rows.flatten().tolist()]).view_as(rows)


@dataclass(frozen=True, eq=False)
class Record:
    """One choice of ``encode``: which patches were there, and what became of them."""

    layer: int
    layout: Any
    patches: Tensor
    selection: Any


class Hiding:
    """Replays choices in an unpatched encoder whose rows all stay. ``alive (rows,)``: which of them may be seen."""

    def __init__(self, parts: Any, records: list[Record]):
        self.parts, self.records = parts, list(records)
        self.arguments: dict[str, Any] = {}
        self.alive = torch.ones(0, dtype=torch.bool)
        self.offset = 0

    def enter_seam(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    def enter_block(self, layer: int, args: Any, kwargs: Any) -> Any:
        hidden = args[0]
        flat = hidden.flatten(0, -2)
        if layer == 0:
            self.alive = torch.ones(flat.shape[0], dtype=torch.bool)
        self.offset = 0
        first = 0
        while first < flat.shape[0] and any(record.layer == layer - 1 for record in self.records):
            record = next(record for record in self.records if record.layer == layer - 1)
            self.records.remove(record)
            rows = token_rows(self.parts, record.layout, self.arguments, first)
            flat = self.replay(flat, rows, record)
            first += rows.numel() + self.parts.prefix * record.layout.tiles
        return (flat.view_as(hidden), *args[1:]), kwargs

    def replay(self, flat: Tensor, rows: Tensor, record: Record) -> Tensor:
        if record.selection is None:
            return flat
        old, flat = flat, flat.clone()
        merge = record.selection.merge
        for tile, (patches, keep) in enumerate(zip(record.patches, record.selection.keep, strict=True)):
            present = rows[tile, patches]
            self.alive[present.flatten()] = False
            self.alive[present[keep].flatten()] = True
            for entry in range(len(keep) if merge is not None else 0):
                sources = (merge.target[tile] == entry).nonzero()[:, 0]
                weights = merge.weight[tile, sources]
                flat[present[keep[entry]]] = torch.einsum("n,nkd->kd", weights / weights.sum(), old[present[sources]])
        return flat

    def mask(self, query: Tensor) -> Tensor:
        """Which keys the queries of the next call to the kernel may see: ``(B, 1, q, k)`` bool."""
        batch, _, length, _ = query.shape
        alive = self.alive[self.offset : self.offset + batch * length].view(batch, 1, 1, length)
        self.offset += batch * length
        return alive | torch.eye(length, dtype=torch.bool)


class _Hook:
    def __init__(self, hiding: Hiding, layer: int):
        self.hiding, self.layer = hiding, layer

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        return self.hiding.enter_block(self.layer, args, kwargs)


class _Seam:
    """Tells which arguments the encoder runs on; they give the order of its rows."""

    def __init__(self, base: Any, name: str, state: Hiding):
        self.original, self.state = getattr(type(base), name).__get__(base), state

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs).arguments
        self.state.enter_seam({**bound, **bound.get("kwargs", {})})
        return self.original(*args, **kwargs)


@contextmanager
def hiding(model: Any, records: list[Record]) -> Iterator[None]:
    """Inside the block the vision encoder hides what ``records`` dropped, and never removes it."""
    parts = parts_of(model)
    state = Hiding(parts, records)
    modules = [parts.vision_attention(layer) for layer in range(len(parts.vision_layers))]
    eager = modules[0].config._attn_implementation == "eager"
    table: Any = type(modules[0]).forward.__globals__ if eager else ALL_ATTENTION_FUNCTIONS._local_mapping
    name = "eager_attention_forward" if eager else modules[0].config._attn_implementation
    original = table[name] if eager else ALL_ATTENTION_FUNCTIONS[name]

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any):
        if module in modules:
            floor = torch.finfo(query.dtype).min
            seen = state.mask(query)
            hidden = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, floor)
            attention_mask = hidden if attention_mask is None else (hidden + attention_mask).clamp(min=floor)
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    before = table.get(name)
    handles = [b.register_forward_pre_hook(_Hook(state, i), with_kwargs=True) for i, b in enumerate(parts.vision_layers)]
    table[name] = kernel
    seams = ["get_image_features", "get_video_features"]
    for seam in seams:
        if hasattr(parts.base, seam):
            parts.base.__dict__[seam] = _Seam(parts.base, seam, state)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for seam in seams:
            parts.base.__dict__.pop(seam, None)
        if before is None:
            del table[name]
        else:
            table[name] = before
