"""What ``compact_cache`` means, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(stores: Sequence[Tensor], rows: Tensor) -> None:
    """Raises ValueError where rows cannot be shared out among the stores; looks at shapes alone."""
    shared_out = rows.ndim == 3 or (rows.ndim == 4 and rows.shape[0] > 0 and len(stores) % rows.shape[0] == 0)
    if not shared_out or not all(_fits(store, rows) for store in stores):
        shapes = sorted({tuple(store.shape) for store in stores})
        raise ValueError(
            f"rows {tuple(rows.shape)} for {len(stores)} stores {shapes}; allowed are (B, 1 or kv_heads, n) for stores "
            "(B, kv_heads, L, D), or the same behind a dimension whose size divides the number of stores"
        )


def _fits(store: Tensor, rows: Tensor) -> bool:
    return store.ndim == 4 and store.shape[0] == rows.shape[-3] and rows.shape[-2] in (1, store.shape[1])


def rows_of_stores(rows: Tensor, stores: int) -> list[Tensor]:
    """The ``(B, 1 or kv_heads, n)`` that each store follows."""
    groups = rows if rows.ndim == 4 else rows[None]
    return [groups[number * len(groups) // stores] for number in range(stores)]


def compact_cache(stores: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """See :func:`vlprune.kernels.compact_cache`."""
    return [_gather(store, own) for store, own in zip(stores, rows_of_stores(rows, len(stores)), strict=True)]


def compact_cache_(stores: Sequence[Tensor], rows: Tensor, fill: float | None) -> None:
    """See :func:`vlprune.kernels.compact_cache_`."""
    count = rows.shape[-1]
    for store, own in zip(stores, rows_of_stores(rows, len(stores)), strict=True):
        store[:, :, :count].copy_(_gather(store, own))
        if fill is not None:
            store[:, :, count:].fill_(fill)


def _gather(store: Tensor, rows: Tensor) -> Tensor:
    batch, heads, length, width = store.shape
    index = rows.clamp(min=0)
    if store.is_contiguous():  # whole rows are copied at once
        flat = store.view(batch * heads * length, width)
        return flat.index_select(0, _flat(index, heads, length)).view(batch, heads, -1, width)
    samples = torch.arange(batch, device=index.device)[:, None, None]
    return store[samples, torch.arange(heads, device=index.device)[:, None], index].contiguous()


def _flat(index: Tensor, heads: int, length: int) -> Tensor:
    """``index (B, 1 or heads, n)`` into a store whose first three dimensions are one."""
    start = torch.arange(index.shape[0] * heads, device=index.device).view(-1, heads, 1) * length
    return (index + start).flatten()


def spread(gradient: Tensor, rows: Tensor, length: int) -> Tensor:
    """The gradient ``(B, kv_heads, n, D)`` of the entries at ``rows`` as one of the store of ``length`` they came from."""
    batch, heads, _, width = gradient.shape
    flat = gradient.new_zeros(batch * heads * length, width)
    flat = flat.index_add(0, _flat(rows.clamp(min=0), heads, length), gradient.reshape(-1, width))
    return flat.view(batch, heads, length, width)
