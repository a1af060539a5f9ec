"""Weighted sums of the columns of the attention map."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.attention_columns import reference
from vlprune.kernels.dispatch import on_triton


def attention_columns(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    scaling: float | None = None,
    causal_shift: int | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention that every key receives, summed over the queries by their weights.

    ``result[b, h, j] = sum over i of weights[b, i] * softmax(s[b, h, i])[j]``, where the score of query ``i`` and key ``j`` is
    ``s = scaling * query[i] . key[j]``, or ``softcap * tanh(s / softcap)``, and the softmax goes over the keys that the query
    may see. Extra memory is linear in the number of tokens, and the sum runs in the same order each time. Keys of grouped
    queries are not repeated, and the inputs may be strided views.

    Args:
        query: ``(B, heads, q, D)`` of any float type, rotated and normalised.
        key: ``(B, kv_heads, k, D)`` of the same type. ``heads`` is a multiple of ``kv_heads``; heads in succession share one.
        weights: ``(B, q)`` float32, finite. Of a query of weight 0 nothing counts, were it NaN; samples of different
            lengths give their padding that. ``1 / n`` for each of n queries makes the result their mean. A run of zeros at
            either end costs nothing.
        scaling: of the scores; ``D ** -0.5`` if None.
        causal_shift: query ``i`` sees the keys ``j <= i + causal_shift`` alone; all if None. 0 where queries and keys begin
            together, ``k - q`` where they end together. May be negative.
        valid: ``(B, k)`` bool, False for keys that nobody sees. They receive 0.
        softcap: positive.
        lse: ``(B, heads, q)`` float32, natural logarithm of the sum of the exponentials of the scores that a query sees, if an
            attention kernel has told it; infinite for a query that sees none. It is computed if None.

    Returns:
        float32 ``(B, heads, k)``. A query that may see no key adds nothing. What is hidden by ``causal_shift`` or ``valid``
        does not matter, were it NaN. A score that is NaN or plus infinity makes the sums of all keys NaN that its query sees.

        There are no gradients: it is for statistics.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.vlprune.attention_columns(query, key, weights, scaling, causal_shift, valid, softcap, lse)


@torch.library.custom_op("vlprune::attention_columns", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    scaling: float,
    causal_shift: int | None,
    valid: Tensor | None,
    softcap: float | None,
    lse: Tensor | None,
) -> Tensor:
    if on_triton(query):
        from vlprune.kernels.attention_columns import triton

        if triton.supports(query, key):
            return triton.attention_columns(query, key, weights, scaling, causal_shift, valid, softcap, lse)
    return reference.attention_columns(query, key, weights, scaling, causal_shift, valid, softcap, lse)


@_operator.register_fake
def _(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    scaling: float,
    causal_shift: int | None,
    valid: Tensor | None,
    softcap: float | None,
    lse: Tensor | None,
) -> Tensor:
    return query.new_empty(*query.shape[:2], key.shape[2], dtype=torch.float32)
