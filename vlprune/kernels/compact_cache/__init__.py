"""Leaves caches with the surviving entries of their keys and values, all layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlprune.kernels.compact_cache import reference
from vlprune.kernels.dispatch import on_triton


def compact_cache(stores: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The entries at ``rows`` of every store, as new tensors.

    Args:
        stores: keys and values of one layer or of many, each ``(B, kv_heads, L, D)``, where D may differ; any dtype, any
            strides, all on one device.
        rows: int64 on the stores' device: ``(B, 1 or kv_heads, n)``, followed by all stores, or ``(R, B, 1 or kv_heads, n)``,
            of which each is followed by equally many consecutive stores. With keys and values of layer 0, of layer 1 and so
            on, R = 1 lets all layers share their survivors and R = the number of layers gives each its own. Rows are below
            L; negative ones are filler and yield entry 0. Their order is free, and a row may be named twice.

    Returns:
        For each store ``(B, kv_heads, n, D)`` in its dtype, contiguous, bit for bit what was there. Gradients flow back to the
        stores.
    """
    reference.check(stores, rows)
    return torch.ops.vlprune.compact_cache(list(stores), rows)


def compact_cache_(stores: Sequence[Tensor], rows: Tensor, fill: float | None = 0.0) -> None:
    """Moves the entries at ``rows`` of every store to the front of that store.

    Args:
        stores: as for :func:`compact_cache`. None of them overlaps another one or itself.
        rows: as for :func:`compact_cache`, n <= L. For each sample and head filler comes first, then rows that ascend
            strictly; other orders give wrong entries. Filler slots get entry 0.
        fill: what the slots ``[n, L)`` hold afterwards; None leaves them with what they are, which is undefined.

    No gradients: a store must not require them.
    """
    reference.check(stores, rows)
    torch.ops.vlprune.compact_cache_(list(stores), rows, fill)


@torch.library.custom_op("vlprune::compact_cache", mutates_args=())
def _operator(stores: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    if on_triton(rows):
        from vlprune.kernels.compact_cache import triton

        if triton.supports(stores, rows):
            return triton.compact_cache(stores, rows)
    return reference.compact_cache(stores, rows)


@_operator.register_fake
def _(stores: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [store.new_empty(*store.shape[:2], rows.shape[-1], store.shape[3]) for store in stores]


def _remember(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: list[Tensor]) -> None:
    stores, rows = inputs
    ctx.lengths = [store.shape[2] for store in stores]
    ctx.save_for_backward(rows)


def _backward(ctx: Any, gradients: Sequence[Tensor]) -> tuple[list[Tensor], None]:
    (rows,) = ctx.saved_tensors
    each = reference.rows_of_stores(rows, len(gradients))
    return [reference.spread(g, own, length) for g, own, length in zip(gradients, each, ctx.lengths, strict=True)], None


_operator.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("vlprune::compact_cache_", mutates_args=("stores",))
def _operator_in_place(stores: Sequence[Tensor], rows: Tensor, fill: float | None) -> None:
    if on_triton(rows):
        from vlprune.kernels.compact_cache import triton

        if triton.supports_in_place(stores, rows):
            triton.compact_cache_(stores, rows, fill)
            return
    reference.compact_cache_(stores, rows, fill)


@_operator_in_place.register_fake
def _(stores: Sequence[Tensor], rows: Tensor, fill: float | None) -> None:
    pass
