"""What ``bipartite_match`` means, in PyTorch: over blocks of targets, so that memory stays linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor

AT_ONCE = 2**22
"""Similarities that exist at one time, at most, unless there are more sources than an eighth of that."""
SMALLEST = 1e-12
"""A norm below it is taken for it, so that a row of zeros has the cosine 0 to everything."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of products of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ready(rows: Tensor) -> Tensor:
    """``rows`` as :func:`products` multiplies them: where tensor cores add up products of halves they stay halves."""
    halves = rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)
    wider = hasattr(torch.ops.aten.bmm, "dtype") and torch.version.hip is None  # a product wider than its factors
    return rows if halves and wider else rows.to(wide(rows.dtype))


def products(left: Tensor, right: Tensor) -> Tensor:
    """``(B, M, N)`` dot products of rows ``(B, M, D)`` and ``(B, N, D)``, in :func:`wide` precision whatever autocast says."""
    left, right = ready(left), ready(right)
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == wide(left.dtype):
            return torch.bmm(left, right.mT)
        return torch.ops.aten.bmm.dtype(left, right.mT, torch.float32)


def inverse_norms(rows: Tensor) -> Tensor:
    """``(B, N)`` of rows ``(B, N, D)``; 0 for one with an infinity, NaN for one with a NaN, 1e12 for one of zeros."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=wide(rows.dtype)).clamp(min=SMALLEST).reciprocal()


def bipartite_match(source: Tensor, target: Tensor, normalise: bool, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`vlprune.kernels.bipartite_match`."""
    batch, sources, _ = source.shape
    rows, scale = ready(source), inverse_norms(source)[..., None]
    best = torch.full_like(scale[..., 0], -math.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    step = max(8, AT_ONCE // max(1, batch * sources))
    for first in range(0, target.shape[1], step):
        block = slice(first, first + step)
        scores = products(rows, target[:, block])
        if normalise:
            scores *= inverse_norms(target[:, block])[:, None]
            scores *= scale
        scores.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        if valid is not None:
            scores.masked_fill_(~valid[:, None, block], -math.inf)
        value, place = scores.max(-1)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, place + first, index)
    return best, index


def gradients(
    gradient: Tensor, source: Tensor, target: Tensor, similarity: Tensor, index: Tensor, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Those of sources and targets, from one ``(B, S)`` of the similarities. Nothing for rows without a partner."""
    dtype, matched = wide(source.dtype), similarity.isfinite()[..., None]
    rows, places = source.to(dtype), index[..., None].expand(-1, -1, source.shape[2])
    partners = target.gather(1, places).to(dtype) if target.shape[1] else torch.zeros_like(rows)
    of_rows, of_partners = partners, rows
    if normalise:
        # The cosine's gradient by one of the unit rows is the other, less what would only change a length.
        scale_rows, scale_partners = _lengths_known(rows), _lengths_known(partners)
        rows, partners, cosine = rows * scale_rows, partners * scale_partners, similarity[..., None]
        of_rows, of_partners = scale_rows * (partners - cosine * rows), scale_partners * (rows - cosine * partners)
    of_rows, of_partners = (torch.where(matched, gradient[..., None] * part, 0) for part in (of_rows, of_partners))
    of_target = torch.zeros(target.shape, dtype=dtype, device=target.device)
    if target.shape[1]:
        of_target = of_target.scatter_add(1, places, of_partners)
    return of_rows.to(source.dtype), of_target.to(target.dtype)


def _lengths_known(rows: Tensor) -> Tensor:
    """``(B, N, 1)`` inverse norms, but 0 for rows of zeros: their cosine is set, and nothing of it flows back to anyone."""
    scale = inverse_norms(rows)[..., None]
    return scale.masked_fill(scale * SMALLEST >= 1, 0)
