"""What ``merge_rows`` means, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulates_in(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def merge_rows(values: Tensor, target: Tensor, weight: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """See :func:`vlprune.kernels.merge_rows`."""
    (batch, length, width), exact = values.shape, accumulates_in(values)
    weight = values.new_ones(batch, length, dtype=exact) if weight is None else weight.to(exact)
    slot = _slots(target, count).flatten()
    sums = values.new_zeros(batch * (count + 1), width, dtype=exact)
    sums.index_add_(0, slot, (values * weight[..., None]).reshape(batch * length, width))
    mass = weight.new_zeros(batch * (count + 1)).index_add_(0, slot, weight.flatten())
    sums, mass = sums.view(batch, count + 1, width)[:, :count], mass.view(batch, count + 1)[:, :count].contiguous()
    means = torch.where(mass[..., None] == 0, 0.0, sums / mass[..., None])
    return means.to(values.dtype), mass


def _slots(target: Tensor, count: int) -> Tensor:
    """Where the rows belong in the segments of all samples, with one more behind those of each for rows without one."""
    return torch.where(target < 0, count, target) + torch.arange(len(target), device=target.device)[:, None] * (count + 1)


def shares(of_means: Tensor, target: Tensor, mass: Tensor) -> Tensor:
    """The gradient of the means over the mass of their segment ``(B, N, D)``, for every row that is in one."""
    scaled = torch.where(mass[..., None] == 0, 0.0, of_means / mass[..., None])
    return _of_rows(scaled, target)


def value_gradient(share: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """``(B, N, D)``. A row moves its segment's mean by its weight's share of the mass."""
    return share if weight is None else share * torch.where(target < 0, 0.0, weight)[..., None]


def weight_gradient(share: Tensor, of_mass: Tensor, values: Tensor, target: Tensor, means: Tensor) -> Tensor:
    """``(B, N)``. A heavier row draws its segment's mean towards itself, and adds to the mass."""
    drawn = (share * (values - _of_rows(means, target))).sum(-1)
    return torch.where(target < 0, 0.0, drawn + _of_rows(of_mass[..., None], target)[..., 0])


def _of_rows(segments: Tensor, target: Tensor) -> Tensor:
    """``segments (B, count, C)`` of every row, ``(B, N, C)``; 0 for rows without one."""
    batch, count, width = segments.shape
    padded = torch.cat([segments, segments.new_zeros(batch, 1, width)], 1).flatten(0, 1)
    return padded.index_select(0, _slots(target, count).flatten()).view(*target.shape, width)
