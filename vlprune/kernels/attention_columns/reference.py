"""What ``attention_columns`` means, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlprune.kernels.attention_rows.reference import grouped_scores

BLOCK = 256
"""Queries whose attention is held at a time."""


def attention_columns(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    scaling: float,
    causal_shift: int | None,
    valid: Tensor | None,
    softcap: float | None,
    lse: Tensor | None,
) -> Tensor:
    """See :func:`vlprune.kernels.attention_columns`."""
    length = key.shape[2]
    out = query.new_zeros(*query.shape[:2], length, dtype=torch.float32)
    if out.numel() == 0:
        return out
    key = key.float()
    for index, last in _blocks(weights):
        end = length if causal_shift is None else min(length, last + causal_shift + 1)
        if end <= 0:
            continue
        scores = grouped_scores(query.index_select(2, index).float(), key[:, :, :end], scaling, softcap)
        block = weights.index_select(1, index).float()
        hidden = _hidden(index, end, block, causal_shift, valid)
        given = None if lse is None else lse.index_select(2, index)
        factors = _exponentials(scores.masked_fill_(hidden, -torch.inf), given) * block[:, None]
        scores.masked_fill_(hidden, 0.0)  # once more, for NaN
        out[:, :, :end] += (factors[:, :, None] @ scores)[:, :, 0]
    return out


def _blocks(weights: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Indices of queries, and the last of them. On a CPU those without weight are left out; a GPU is not waited for."""
    index = torch.arange(weights.shape[1], device=weights.device)
    if weights.device.type == "cpu":
        index = index[(weights != 0).any(0)]
        for block in index.split(BLOCK):
            if len(block):
                yield block, int(block[-1])
        return
    for start in range(0, len(index), BLOCK):
        block = index[start : start + BLOCK]
        yield block, start + len(block) - 1


def _hidden(index: Tensor, end: int, weights: Tensor, causal_shift: int | None, valid: Tensor | None) -> Tensor:
    """What does not count of the scores ``(B, heads, q, end)`` of the queries at ``index``, as ``(B, 1, q, end or 1)``."""
    hidden = (weights == 0)[:, None, :, None]
    if causal_shift is not None:
        hidden = hidden | (torch.arange(end, device=index.device) > (index + causal_shift)[:, None])
    return hidden if valid is None else hidden | ~valid[:, None, None, :end]


def _exponentials(scores: Tensor, lse: Tensor | None) -> Tensor:
    """Makes them of ``scores``, in place, and returns what each query's ``(B, heads, q)`` are to be multiplied by."""
    if lse is not None:
        scores.sub_(lse.float().masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()
        return torch.ones_like(lse, dtype=torch.float32)
    top = scores.amax(-1, keepdim=True)
    # A row with plus infinity in it is NaN, and shows it in each of its scores.
    top = top.masked_fill_(top == -torch.inf, 0.0).masked_fill_(top == torch.inf, torch.nan)
    total = scores.sub_(top).exp_().sum(-1)
    return total.masked_fill_((total == 0) | total.isnan(), 1.0).reciprocal_()
