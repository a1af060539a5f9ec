"""Rows of a vision encoder of which some leave between two blocks, and what its blocks are to be given then.

Encoders come in two forms. In one, a *tile* is a row of the batch: ``(tiles, [CLS] + patches, hidden)``; where images keep
different numbers, the shorter tiles get filler that nobody attends to. In the other, all images are *packed* one behind the
other: ``(rows, hidden)`` with the bounds of what attends to each other; there rows leave without filler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlprune.engine.devices import to_device
from vlprune.engine.family import Parts
from vlprune.engine.probes import Place
from vlprune.errors import UnsupportedModelError
from vlprune.image import ImageLayout

Grids = Sequence[tuple[int, int]]
"""Tokens of a tile of each image, rows and columns."""


class Tiles:
    """Rows of an encoder that has a tile in each row of its batch.

    ``origin (tiles, L)``: which row of its tile each of the rows left was in the beginning, None while all are there.
    ``filler (tiles, L)``: which of them stand for nothing, None if none does.
    """

    def __init__(self, parts: Parts, layouts: Sequence[ImageLayout], grids: Grids, arguments: dict[str, Any]):
        self.prefix = parts.prefix
        self.places: list[Place] = []
        self.length = first = 0
        for layout, grid in zip(layouts, grids, strict=True):
            group = parts.family.groups(parts.model, grid)
            patches = torch.arange(group.shape[0]).expand(layout.tiles, -1)
            rows = (group + self.prefix).expand(layout.tiles, -1, -1)
            self.places.append(Place(torch.arange(first, first + layout.tiles), rows, patches, group.shape[0]))
            self.length = self.prefix + group.numel()
            first += layout.tiles
        self.origin: Tensor | None = None
        self.filler: Tensor | None = None
        self.memo: list[tuple[Any, Any]] = []

    def cut(self, hidden: Tensor, places: list[Place]) -> tuple[Tensor, list[Place]]:
        """``hidden (tiles, L, D)`` with the rows at ``places`` alone, and where those are now. [CLS] stays."""
        if self.origin is None:
            _check_rows(hidden, self.length)
        lengths = [place.rows[0].numel() for place in places]
        if all(self.prefix + length == hidden.shape[1] for length in lengths):
            return hidden, places
        head = torch.arange(self.prefix, device=hidden.device)
        columns, now = [], []
        for place, length in zip(places, lengths, strict=True):
            rows = to_device(place.rows, hidden.device).flatten(1).contiguous()
            kept = rows.sort(1).values
            filler = kept[:, -1:].expand(-1, max(lengths) - length)
            columns.append(torch.cat([head.expand(rows.shape[0], -1), kept, filler], 1))
            now.append(replace(place, rows=(torch.searchsorted(kept, rows) + self.prefix).view_as(place.rows)))
        index = torch.cat(columns)
        self.origin = index if self.origin is None else self.origin.gather(1, index)
        self.filler = self._filler(lengths, [place.rows.shape[0] for place in places], hidden.device)
        self.memo = []
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2])), now

    def _filler(self, lengths: list[int], tiles: list[int], device: torch.device) -> Tensor | None:
        if min(lengths) == max(lengths):
            return None
        ends = torch.tensor(lengths).repeat_interleave(torch.tensor(tiles)) + self.prefix
        return to_device(torch.arange(self.prefix + max(lengths)) >= ends[:, None], device)

    def translate(self, block: Any, args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Any:
        """Arguments of a block: nobody may attend to filler. Without filler and mask none is built."""
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if given is None and self.filler is None:
            return args, kwargs
        mask = _once(self.memo, given, lambda: self._mask(block, given, hidden)).to(hidden.device)
        return _with_mask(args, kwargs, mask)

    def _mask(self, block: Any, given: Tensor | None, hidden: Tensor) -> Tensor:
        """The attention mask for the rows that are left, ``given`` the one for all rows."""
        if given is None:
            assert self.filler is not None
            return _hiding(block, self.filler, hidden.dtype)
        assert self.origin is not None
        origin = self.origin.to(given.device)
        hidden_columns = torch.zeros_like(origin, dtype=torch.bool) if self.filler is None else self.filler.to(given.device)
        if given.ndim == 2:
            return given.gather(1, origin).masked_fill(hidden_columns, 0)
        mask = given.expand(origin.shape[0], *given.shape[1:])
        mask = mask.gather(2, origin[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, origin[:, None, None].expand(*mask.shape[:3], -1))
        return mask.masked_fill(hidden_columns[:, None, None], _floor(mask.dtype))

    def restore_tokens(self, out: Tensor) -> Tensor:
        """The projector's ``out (tiles, L, D)``, [CLS] left out, at the places of all patches; zeros for those that left."""
        return self._restore(out, self.prefix)

    def restore_rows(self, out: Tensor) -> Tensor:
        """``out (tiles, L, D)`` of the encoder with all its rows; zeros for those that left."""
        return self._restore(out, 0)

    def _restore(self, out: Tensor, first: int) -> Tensor:
        assert self.origin is not None
        length = self.length - first
        place = self.origin[:, first:].to(out.device) - first
        if self.filler is not None:
            place = place.masked_fill(self.filler[:, first:].to(out.device), length)
        full = out.new_zeros(out.shape[0], length + 1, out.shape[2])
        return full.scatter(1, place[..., None].expand_as(out), out)[:, :-1]


def _hiding(block: Any, filler: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention mask that hides ``filler (tiles, L)``: as it is for flash attention, else ``(tiles, 1, L, L)``."""
    if "attention_mask" not in inspect.signature(type(block).forward).parameters:
        raise UnsupportedModelError(
            f"{type(block).__name__} takes no attention mask, so images of one batch cannot keep different numbers of "
            "patches; pass one image at a time, or a method that keeps as many of each"
        )
    implementation = _implementation(block)
    if "flash" in implementation:
        return (~filler).to(torch.int64)
    mask = ~filler if implementation == "sdpa" else torch.zeros_like(filler, dtype=dtype).masked_fill(filler, _floor(dtype))
    return mask[:, None, None].expand(-1, -1, filler.shape[1], -1)


def _implementation(block: Any) -> str:
    """What the block calls its attention kernel."""
    return next(m.config._attn_implementation for m in block.modules() if hasattr(m, "config")) or "eager"


BOUNDS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments of blocks: where each stretch of rows begins that attend to each other, and the end ``(stretches + 1,)``."""

LONGEST = ("max_seqlen", "max_length_q", "max_length_k")
"""Arguments that hold a number of rows that no stretch exceeds."""


class Packed:
    """Rows of an encoder that has all images one behind the other.

    ``origin (rows,)``: which row each of the rows left was in the beginning, ascending, None while all are there. Inside the
    encoder groups of patches may stand in an order of windows; rows that leave do not change it.
    """

    filler = None

    def __init__(self, parts: Parts, layouts: Sequence[ImageLayout], grids: Grids, arguments: dict[str, Any]):
        family = parts.family
        order = None if family.order is None else family.order(parts.model, arguments)
        position = None if order is None else order.cpu().argsort()
        self.places: list[Place] = []
        self.length, self.size = 0, 1
        for layout, grid in zip(layouts, grids, strict=True):
            group = family.groups(parts.model, grid)
            self.size = group.shape[1]
            rows = self.length + torch.arange(layout.tiles)[:, None, None] * group.numel() + group
            if position is not None:
                rows = position[rows // self.size] * self.size + rows % self.size
            patches = torch.arange(group.shape[0]).expand(layout.tiles, -1)
            self.places.append(Place(torch.zeros(layout.tiles, dtype=torch.long), rows, patches, group.shape[0]))
            self.length += layout.tiles * group.numel()
        self.tiles = sum(layout.tiles for layout in layouts)
        self.origin: Tensor | None = None
        self.memo: list[tuple[Any, Any]] = []

    def cut(self, hidden: Tensor, places: list[Place]) -> tuple[Tensor, list[Place]]:
        """``hidden (1, rows, D)`` with the rows at ``places`` alone, in the order that they have, and where those are now."""
        if self.origin is None:
            _check_rows(hidden, self.length)
        rows = [to_device(place.rows, hidden.device) for place in places]
        kept = torch.cat([row.flatten() for row in rows]).sort().values
        if kept.shape[0] == hidden.shape[1]:
            return hidden, places
        self.origin = kept if self.origin is None else self.origin[kept]
        self.memo = []
        now = [torch.searchsorted(kept, row.contiguous()) for row in rows]
        places = [replace(place, rows=row) for place, row in zip(places, now, strict=True)]
        return hidden[:, kept], places

    def translate(self, block: Any, args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Any:
        """Arguments of a block: bounds, masks and rotary tables of the rows that are left."""
        kwargs = dict(kwargs)
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        bounded = [name for name in BOUNDS if kwargs.get(name) is not None]
        if mask is None and not bounded:
            raise UnsupportedModelError(
                f"{type(block).__name__} is not told where images begin by {' or '.join(BOUNDS)}, so nothing can leave "
                "between them; load the model with attn_implementation='sdpa'"
            )
        for name in bounded:
            kwargs[name] = _once(self.memo, kwargs[name], lambda given=kwargs[name]: self._bounds(block, given))
        for name in LONGEST:
            # It goes on being true of stretches that have become shorter; by how much the device would have to be asked.
            if isinstance(kwargs.get(name), int):
                kwargs[name] = min(kwargs[name], hidden.shape[-2])
        tables = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = _once(self.memo, tables, lambda: tuple(self._kept(table, -2) for table in tables))
        if mask is None:
            return args, kwargs
        return _with_mask(args, kwargs, _once(self.memo, mask, lambda: self._kept(self._kept(mask, -1), -2)))

    def _kept(self, values: Tensor, dim: int) -> Tensor:
        assert self.origin is not None
        return values.index_select(dim, self.origin.to(values.device))

    def _bounds(self, block: Any, bounds: Tensor) -> Tensor:
        """Bounds of the rows that are left. Only the device knows of which windows nobody is; some of each tile always are.

        Flash attention takes empty stretches. For other kernels transformers asks for the lengths in every block and cannot
        do with a zero, so the device is asked here, once for all blocks up to the next drop, and transformers gets an answer
        that lies on the host.
        """
        assert self.origin is not None
        left = torch.searchsorted(self.origin.to(bounds.device), bounds.long()).to(bounds.dtype)
        if len(bounds) - 1 == self.tiles or "flash" in _implementation(block):
            return left
        return left.cpu().unique_consecutive()

    def restore_tokens(self, out: Tensor) -> Tensor:
        """The merger's ``out (tokens, D)`` at the places of all tokens; zeros for those that left."""
        assert self.origin is not None
        full = out.new_zeros(self.length // self.size, out.shape[-1])
        return full.index_copy(0, self.origin[:: self.size].to(out.device) // self.size, out)

    def restore_rows(self, out: Tensor) -> Tensor:
        """``out (..., rows, D)`` of the encoder with all its rows; zeros for those that left."""
        assert self.origin is not None
        full = out.new_zeros(*out.shape[:-2], self.length, out.shape[-1])
        return full.index_copy(-2, self.origin.to(out.device), out)


# ------------------------------------------------------------------ both


def _check_rows(hidden: Tensor, length: int) -> None:
    if hidden.shape[1] != length:
        raise UnsupportedModelError(
            f"the vision encoder has {hidden.shape[1]} rows where the visual tokens stand for {length}: its patches are "
            "mixed behind it, so none can leave inside of it. Methods with select() can be used."
        )


def _with_mask(args: tuple, kwargs: dict[str, Any], mask: Tensor) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a block with another attention mask, at the place where it was given."""
    if len(args) > 1:
        return (args[0], mask, *args[2:]), kwargs
    return args, {**kwargs, "attention_mask": mask}


def _once(memo: list[tuple[Any, Any]], given: Any, make: Callable[[], Any]) -> Any:
    """Blocks share what the first one of them computed of ``given``, which is held, so that its identity is its own."""
    found = next((made for known, made in memo if known is given), None)
    if found is None:
        found = make()
        memo.append((given, found))
    return found


def _floor(dtype: torch.dtype) -> float | bool:
    """What hides a key in a mask of this type."""
    return False if dtype == torch.bool else torch.finfo(dtype).min
