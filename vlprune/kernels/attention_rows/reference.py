"""What ``attention_rows`` means, in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 256
"""Rows, each head's counted, that are held at a time where the heads are reduced."""


def attention_rows(
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
    """See :func:`vlprune.kernels.attention_rows`."""
    batch, heads, queries, _ = query.shape
    shape = (batch, *(() if reduce_heads else (heads,)), rows.shape[1], key.shape[2])
    if queries == 0 or math.prod(shape) == 0:
        return query.new_zeros(shape, dtype=torch.float32)
    key = key.float()

    def of(part: Tensor) -> Tensor:
        scores = grouped_scores(_picked(query, part), key, scaling, softcap)
        _hide(scores, part.clamp(min=0), causal_shift, valid, mask)
        _softmax(scores, part < 0)
        return scores

    if not reduce_heads:
        return of(rows)
    return torch.cat([of(part).mean(1) for part in rows.split(max(1, BLOCK // heads), 1)], 1)


def _picked(query: Tensor, rows: Tensor) -> Tensor:
    index = rows.clamp(min=0)[:, None, :, None]
    return query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3])).float()


def grouped_scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scores ``(B, heads, q, k)`` of float32 queries and keys, without repeating the keys of grouped heads."""
    grouped = (query * scaling).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("bgirc,bgkc->bgirk", grouped, key).flatten(1, 2)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hide(scores: Tensor, index: Tensor, causal_shift: int | None, valid: Tensor | None, mask: Tensor | None) -> None:
    """Sets ``scores (B, heads, R, k)`` of what the queries at ``index (B, R)`` do not see to minus infinity."""
    if mask is not None:
        mask = mask.expand(scores.shape[0], *mask.shape[1:])
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores.add_(mask)
    if causal_shift is not None:
        hidden = torch.arange(scores.shape[-1], device=scores.device) > (index + causal_shift)[:, :, None]
        scores.masked_fill_(hidden[:, None], -torch.inf)
    if valid is not None:
        scores.masked_fill_(~valid[:, None, None], -torch.inf)


def _softmax(scores: Tensor, filler: Tensor) -> None:
    """In place: one tensor of the result's size is all that is needed."""
    top = scores.amax(-1, keepdim=True)
    scores.sub_(top.masked_fill_(top == -torch.inf, 0.0)).exp_()
    total = scores.sum(-1, keepdim=True)
    scores.div_(total.masked_fill_(total == 0, 1.0)).masked_fill_(filler[:, None, :, None], 0.0)
