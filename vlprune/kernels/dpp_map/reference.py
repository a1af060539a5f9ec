"""What ``dpp_map`` means, in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = torch.finfo(torch.float32).min
"""Residual of a point that exists but has none that is a number. -inf is that of points chosen or not valid."""


def first_residual(kernel: Tensor, valid: Tensor | None) -> Tensor:
    """``(B, N)`` the diagonal, float32 or float64."""
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    residual = at_least(kernel.diagonal(dim1=1, dim2=2).to(dtype))
    return residual if valid is None else residual.masked_fill(~valid, -math.inf)


def at_least(residual: Tensor) -> Tensor:
    """What is below :data:`LEAST`, or NaN, becomes :data:`LEAST`."""
    return residual.masked_fill(~(residual >= LEAST), LEAST)


def dpp_map(kernel: Tensor, count: int, valid: Tensor | None, floor: float) -> Tensor:
    """See :func:`vlprune.kernels.dpp_map`."""
    batch, points, _ = kernel.shape
    chosen = torch.full((batch, count), -1, dtype=torch.int64, device=kernel.device)
    if chosen.numel() * points == 0:
        return chosen
    residual = first_residual(kernel, valid)
    factors = residual.new_empty(batch, count, points)
    samples = torch.arange(batch, device=kernel.device)
    for number in range(count):
        best, point = residual.max(1)
        chosen[:, number] = torch.where(best == -math.inf, -1, point)
        row = kernel[samples, point].to(residual.dtype)
        factor = (row - _explained(factors[:, :number], point)) / best.sqrt()[:, None]
        factors[:, number] = torch.where((best > floor)[:, None], factor, 0)
        changed = at_least(residual - factors[:, number].square())
        residual = changed.masked_fill(residual == -math.inf, -math.inf).scatter_(1, point[:, None], -math.inf)
    return chosen


def _explained(factors: Tensor, point: Tensor) -> Tensor:
    """``(B, N)`` what the ``factors (B, rounds, N)`` so far say of the row of ``point (B,)``."""
    weights = factors.gather(2, point[:, None, None].expand(-1, factors.shape[1], 1))
    with torch.autocast(factors.device.type, enabled=False):
        return torch.bmm(weights.mT, factors)[:, 0]
