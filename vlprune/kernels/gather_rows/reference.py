"""What ``gather_rows`` means, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_rows(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """See :func:`vlprune.kernels.gather_rows`."""
    index = rows.clamp(min=0)
    return [_gather(tensor, index) for tensor in tensors]


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    if tensor.shape[0] == 1:
        return tensor[0].index_select(0, index.flatten()).unflatten(0, index.shape)
    flat = tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])
    start = torch.arange(tensor.shape[0], device=index.device)[:, None] * tensor.shape[1]
    return flat.index_select(0, (index + start).flatten()).unflatten(0, index.shape)


def spread(gradient: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """The gradient ``(B, n, ...)`` of gathered rows as one of the tensor, of ``shape``, that they came from."""
    index = rows.clamp(min=0)
    start = torch.arange(index.shape[0], device=index.device)[:, None] * (shape[1] if shape[0] > 1 else 0)
    flat = gradient.new_zeros(shape[0] * shape[1], *shape[2:])
    return flat.index_add(0, (index + start).flatten(), gradient.flatten(0, 1)).view(shape)
