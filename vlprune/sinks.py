"""Attention sinks, told by their hidden states: tokens that get much attention and hold little."""

from __future__ import annotations

import torch
from torch import Tensor


def sink_share(hidden: Tensor, first: Tensor | None, channels: int) -> Tensor:
    """Share of each token's squared norm in the largest of its sink channels: ``(B, n, 1)`` of ``hidden (B, n, D)``.

    Sink channels are the ``channels`` in which the first token of a sequence, at row ``first (B,)`` or 0, is largest.
    A row of zeros has the share 0.
    """
    energy = hidden.square()
    start = energy[:, 0] if first is None else energy[torch.arange(len(energy), device=energy.device), first.to(energy.device)]
    sinks = start.topk(min(channels, energy.shape[2]), dim=1).indices
    largest = energy.gather(2, sinks[:, None].expand(-1, energy.shape[1], -1)).amax(2, keepdim=True)
    return largest / energy.sum(2, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
