"""Translates attention masks from logical to physical rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.engine.rows import RowMap, take


def padding(mask: Any, past: int, length: int, batch: int) -> Tensor | None:
    """Which of a forward's ``length`` new tokens are padding: ``(B, length)`` bool, or None where no mask is given.

    ``mask`` is whatever the text model receives: None, ``(B, past + length)``, or ``(B, 1, length, columns)`` as static
    caches have it, bool or additive; its last row sees every token that is not padding.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None
    if not torch.is_tensor(mask):
        return _block_padding(mask, past, length, batch)
    if mask.ndim == 2:
        real = mask[:, past : past + length] if mask.shape[1] >= past + length else mask[:, -length:]
        return ~real.bool()
    row = mask[:, 0, -1, past : past + length]
    return ~(row if row.dtype == torch.bool else row == 0).expand(batch, -1)


def _block_padding(mask: Any, past: int, length: int, batch: int) -> Tensor:
    """What the last query of a block mask of flex attention does not see is padding."""
    device = mask.kv_num_blocks.device
    samples = torch.arange(batch, device=device)[:, None]
    columns = torch.arange(past, past + length, device=device)
    # A mask without padding is shared by all samples.
    last = torch.full((), length - 1, device=device)
    return ~mask.mask_mod(samples, torch.zeros_like(samples), last, columns).expand(batch, length)


def build(rows: Tensor | None, columns: Tensor, past: int, length: int) -> Tensor:
    """A causal mask ``(B, 1, rows, columns)`` bool for a model that would have run without one."""
    if rows is None:
        rows = torch.arange(length, device=columns.device).expand(columns.shape[0], -1)
    rows = rows.to(columns.device)
    return ((rows[:, :, None] + past >= columns[:, None]) & (columns >= 0)[:, None])[:, None]


def translate(mask: Tensor, rows: Tensor | None, columns: Tensor, valid: Tensor) -> Tensor:
    """Gathers rows and columns of a logical ``mask``: ``(B, L)`` for flash attention, else ``(B, 1, q, L)``.

    ``columns (B, slots)`` are in range, and those that are not ``valid`` get hidden.
    """
    columns, valid = columns.to(mask.device), valid.to(mask.device)
    if mask.ndim == 2:
        return mask.gather(1, columns) * valid.to(mask.dtype) if mask.dtype != torch.bool else mask.gather(1, columns) & valid
    batch, slots = columns.shape
    mask = mask.expand(batch, *mask.shape[1:])
    if rows is not None:
        mask = take(mask, rows, 2)
    mask = mask.gather(3, columns[:, None, None].expand(batch, mask.shape[1], mask.shape[2], slots))
    valid = valid[:, None, None]
    return mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, torch.finfo(mask.dtype).min)


@dataclass(frozen=True, eq=False)
class Layer:
    """What a mask of one decoder layer depends on.

    ``slots``: size of a static cache, None for one that grows. ``stored``: entries that a sliding-window layer held before
    this pass, None for layers without a window.
    """

    row_map: RowMap
    rows: Tensor | None
    past: int
    length: int
    slots: int | None
    stored: int | None
    flash: bool


def physical(mask: Any, layer: Layer) -> Any:
    """The mask that a decoder layer needs instead of the logical ``mask``.

    None stays None where nothing has to be hidden, so a causal kernel stays a causal kernel.
    """
    row_map, rows = layer.row_map, layer.rows
    if mask is None:
        held = layer.past + layer.length - row_map.dropped
        # Flash attention needs a mask to tell the entries of a cache of constant size from slots that hold nothing yet.
        unfilled = layer.flash and layer.slots is not None and held < layer.slots
        if not row_map.filler and not unfilled:
            return None
        columns = row_map.columns(held)
        if layer.flash:
            return columns >= 0
        built = build(rows, columns, layer.past, layer.length)
        return built if layer.slots is None else F.pad(built, (0, layer.slots - built.shape[-1]))
    if not torch.is_tensor(mask):
        return block_mask(mask, layer)
    logical = mask.shape[-1]
    if layer.slots is not None and mask.ndim == 2:
        # Flash attention cuts the keys of a cache of constant size to the width of its mask, and counts from its end.
        columns = row_map.columns(layer.past + layer.length - row_map.dropped)
    elif layer.slots is not None and row_map.fixed is not None:
        columns, valid = row_map.fixed
        return translate(mask, rows, columns, valid)
    elif layer.slots is not None:
        columns = row_map.columns(logical)
    else:
        # A window that was full before anything left hands over a mask of its own columns only.
        cut = max(layer.past + layer.length - logical, 0) if layer.stored is not None else 0
        columns = row_map.columns(logical + cut - row_map.dropped)
        if layer.stored is not None:
            columns = columns[:, -(layer.stored + (layer.length if rows is None else rows.shape[1])) :]
        columns = torch.where(columns < 0, columns, columns - cut)
    valid = (columns >= 0) & (columns < logical)
    return translate(mask, rows, columns.clamp(0, logical - 1), valid)


def block_mask(mask: Any, layer: Layer) -> Any:
    """Like :func:`translate` for a block mask of flex attention: the same pairs, looked up at their logical places."""
    from torch.nn.attention.flex_attention import create_block_mask

    logical, queries = mask.seq_lengths[1], layer.length if layer.rows is None else layer.rows.shape[1]
    columns = layer.row_map.columns(layer.past + layer.length - layer.row_map.dropped)
    valid, columns = columns >= 0, columns.clamp(0, logical - 1)
    batch, device = columns.shape[0], columns.device
    rows = torch.arange(queries, device=device).expand(batch, -1) if layer.rows is None else layer.rows.clamp(min=0)
    pair = mask.mask_mod

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pair(b, h, rows[b, q], columns[b, k]) & valid[b, k]

    return create_block_mask(seen, batch, None, queries, columns.shape[1], device=device)
