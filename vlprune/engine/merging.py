"""Rows merged into other rows."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels import merge_rows
from vlprune.method import Mixture, Selection


def merged(features: Tensor, selection: Selection) -> Tensor:
    """``features (..., N, D)`` with every kept row replaced by what the choice merges into it.

    The choice has the same leading dimensions. A kept row that no row of a :class:`Merge` names stays as it is.
    """
    merge = selection.merge
    if merge is None:
        return features
    keep = selection.keep[..., None].expand(*selection.keep.shape, features.shape[-1])
    if isinstance(merge, Mixture):
        with torch.autocast(features.device.type, enabled=False):
            return features.scatter(-2, keep, (merge.weight @ features.to(merge.weight.dtype)).to(features.dtype))
    leading, (rows, width) = features.shape[:-2], features.shape[-2:]
    weight = None if merge.weight is None else merge.weight.reshape(-1, rows)
    means, mass = merge_rows(features.reshape(-1, rows, width), merge.target.reshape(-1, rows), weight, keep.shape[-2])
    means, mass = means.view(*leading, *means.shape[1:]), mass.view(*leading, -1, 1)
    return features.scatter(-2, keep, torch.where(mass > 0, means, features.gather(-2, keep)))
