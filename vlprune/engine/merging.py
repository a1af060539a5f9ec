"""Rows merged into other rows."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.method import Selection


def merged(features: Tensor, selection: Selection) -> Tensor:
    """``features (..., N, D)`` with every kept row replaced by the weighted mean of the rows merged into it.

    The choice has the same leading dimensions. A kept row that no row names stays as it is.
    """
    merge = selection.merge
    if merge is None:
        return features
    keep = selection.keep[..., None].expand(*selection.keep.shape, features.shape[-1])
    count = selection.keep.shape[-1]
    slot = torch.where(merge.target < 0, count, merge.target)
    weight = torch.ones_like(slot, dtype=torch.float32) if merge.weight is None else merge.weight.float()
    sums = features.new_zeros(*slot.shape[:-1], count + 1, features.shape[-1], dtype=torch.float32)
    sums = sums.scatter_add(-2, slot[..., None].expand_as(features), features.float() * weight[..., None])
    mass = weight.new_zeros(*slot.shape[:-1], count + 1).scatter_add(-1, slot, weight)[..., :count, None]
    means = (sums[..., :count, :] / mass.clamp(min=1e-12)).to(features.dtype)
    return features.scatter(-2, keep, torch.where(mass > 0, means, features.gather(-2, keep)))
