"""Softmax rows of a few queries against all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.attention_rows import reference
from vlprune.kernels.dispatch import on_triton


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    *,
    scaling: float | None = None,
    causal_shift: int | None = None,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    reduce_heads: bool = False,
) -> Tensor:
    """Attention that the queries at ``rows`` pay to every key.

    The score of query ``i`` and key ``j`` is ``s = scaling * query[i] . key[j]``, or ``softcap * tanh(s / softcap)``; the
    result is its softmax over the keys that the query may see. It is computed in float32. Keys of grouped queries are not
    repeated, and the inputs may be strided views.

    Args:
        query: ``(B, heads, q, D)`` of any float type, rotated and normalised.
        key: ``(B, kv_heads, k, D)`` of the same type. ``heads`` is a multiple of ``kv_heads``; heads in succession share one.
        rows: ``(B, R)`` int64, which queries: below ``q``, in any order, repeated or not. Negative ones are filler.
        scaling: of the scores; ``D ** -0.5`` if None.
        causal_shift: query ``i`` sees the keys ``j <= i + causal_shift`` alone; all if None. 0 where queries and keys begin
            together, ``k - q`` where they end together. May be negative.
        valid: ``(B, k)`` bool, False for keys that nobody sees; batches of different lengths are told apart by it.
        mask: ``(B or 1, heads or 1, q, k)``: bool, True where a query sees a key, or float, which is added to the scores;
            minus infinity is not seen. It holds beside ``causal_shift`` and ``valid``.
        softcap: positive.
        reduce_heads: the mean over the heads rather than each of them.

    Returns:
        float32 ``(B, heads, R, k)``, or ``(B, R, k)`` with ``reduce_heads``. A row sums to 1. The row of a filler is zero, as
        is one of which no key may be seen. What is hidden by ``causal_shift``, ``valid`` or a bool mask does not matter, were
        it NaN. A score that is seen and NaN or plus infinity makes its whole row NaN, as in any softmax.

        There are no gradients: it is for statistics.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.vlprune.attention_rows(query, key, rows, scaling, causal_shift, valid, mask, softcap, reduce_heads)


@torch.library.custom_op("vlprune::attention_rows", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scaling: float,
    causal_shift: int | None,
    valid: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    reduce_heads: bool,
) -> Tensor:
    if on_triton(query):
        from vlprune.kernels.attention_rows import triton

        if triton.supports(query, key, mask):
            return triton.attention_rows(query, key, rows, scaling, causal_shift, valid, mask, softcap, reduce_heads)
    return reference.attention_rows(query, key, rows, scaling, causal_shift, valid, mask, softcap, reduce_heads)


@_operator.register_fake
def _(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scaling: float,
    causal_shift: int | None,
    valid: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    reduce_heads: bool,
) -> Tensor:
    heads = () if reduce_heads else (query.shape[1],)
    return query.new_empty(query.shape[0], *heads, rows.shape[1], key.shape[2], dtype=torch.float32)
