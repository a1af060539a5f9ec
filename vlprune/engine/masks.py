"""Translates attention masks from logical to physical rows and columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.engine.rows import RowMap, take
from vlprune.errors import VLPruneError


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
        raise VLPruneError(
            f"attention masks of type {type(mask).__name__} are not supported; allowed implementations are sdpa, eager and "
            "flash attention. Load the model with attn_implementation='sdpa'."
        )
    if mask.ndim == 2:
        real = mask[:, past : past + length] if mask.shape[1] >= past + length else mask[:, -length:]
        return ~real.bool()
    row = mask[:, 0, -1, past : past + length]
    return ~(row if row.dtype == torch.bool else row == 0).expand(batch, -1)


def build(rows: Tensor | None, columns: Tensor, past: int, length: int) -> Tensor:
    """A causal mask ``(B, 1, rows, columns)`` bool for a model that would have run without one."""
    if rows is None:
        rows = torch.arange(length, device=columns.device).expand(columns.shape[0], -1)
    return ((rows[:, :, None] + past >= columns[:, None]) & (columns >= 0)[:, None])[:, None]


def translate(mask: Tensor, rows: Tensor | None, columns: Tensor, valid: Tensor) -> Tensor:
    """Gathers rows and columns of a logical ``mask``: ``(B, L)`` for flash attention, else ``(B, 1, q, L)``.

    ``columns (B, slots)`` are in range, and those that are not ``valid`` get hidden.
    """
    if mask.ndim == 2:
        return mask.gather(1, columns) * valid.to(mask.dtype) if mask.dtype != torch.bool else mask.gather(1, columns) & valid
    batch, slots = columns.shape
    mask = mask.expand(batch, *mask.shape[1:])
    if rows is not None:
        mask = take(mask, rows, 2)
    mask = mask.gather(3, columns[:, None, None].expand(batch, mask.shape[1], mask.shape[2], slots))
    valid = valid[:, None, None]
    return mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, torch.finfo(mask.dtype).min)


def physical(mask: Any, row_map: RowMap, rows: Tensor | None, past: int, length: int, slots: int | None, flash: bool) -> Any:
    """The mask that a decoder layer needs instead of the logical ``mask``.

    ``slots``: size of a static cache, None for one that grows. None stays None where nothing has to be hidden, so a
    causal kernel stays a causal kernel.
    """
    if mask is None:
        if not row_map.filler:
            return None
        columns = row_map.columns(past + length - row_map.dropped)
        if flash:
            return columns >= 0
        built = build(rows, columns, past, length)
        return built if slots is None else F.pad(built, (0, slots - built.shape[-1]))
    if slots is not None and row_map.fixed is not None:
        columns, valid = row_map.fixed
    else:
        logical = mask.shape[-1]
        columns = row_map.columns(logical if slots is not None else logical - row_map.dropped)
        valid, columns = (columns >= 0) & (columns < logical), columns.clamp(0, logical - 1)
    return translate(mask, rows, columns, valid)
