"""The attention map in float64, one query after the other: what the operations on it are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_map(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    causal_shift: int | None = None,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``(B, heads, q, k)`` float64. What is not seen takes no part: it is left out, not masked."""
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    out = torch.zeros(batch, heads, queries, keys, dtype=torch.float64, device=query.device)
    for sample in range(batch):
        for head in range(heads):
            for place in range(queries):
                seen = torch.ones(keys, dtype=torch.bool, device=query.device)
                if causal_shift is not None:
                    seen &= torch.arange(keys, device=query.device) <= place + causal_shift
                if valid is not None:
                    seen &= valid[sample]
                added = None if mask is None else mask.expand(batch, heads, queries, keys)[sample, head, place]
                if added is not None:
                    seen &= added if added.dtype == torch.bool else added != -torch.inf
                shared = key[sample, head // (heads // groups)][seen].double()
                score = shared @ query[sample, head, place].double() * (1 / math.sqrt(width) if scaling is None else scaling)
                score = score if softcap is None else softcap * torch.tanh(score / softcap)
                if added is not None and added.dtype != torch.bool:
                    score += added[seen]
                out[sample, head, place, seen] = torch.softmax(score, 0)
    return out


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """``dtype``: of the inputs. Both sides see the same; only sums and powers are taken differently."""
    assert found.dtype == torch.float32
    absolute, relative = (2e-6, 1e-4) if dtype == torch.float32 else (1e-5, 1e-3)
    torch.testing.assert_close(found, wanted.float(), atol=absolute, rtol=relative, equal_nan=True)
