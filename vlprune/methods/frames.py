"""What methods share that divide a budget among the frames of a video. Images count as videos whose frames are their tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.image import ImageTokens, top
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import ranks


def frames_of(image: ImageTokens, features: Tensor) -> tuple[Tensor, Tensor]:
    """``features (total, D)`` as ``(frames, patches, D)``, zeros in the padding, and what is none ``(frames, patches)``."""
    places = image.host(image.layout.placeholder)
    there = places >= 0
    return features[places.clamp(min=0)] * there[..., None], there


def mean_of(rows: Tensor, there: Tensor) -> Tensor:
    """The mean ``(frames, ...)`` of what is ``there`` of ``rows (frames, patches, ...)``."""
    count = there.sum(1).clamp(min=1)
    return rows.sum(1) / count.view(-1, *[1] * (rows.ndim - 2))


def best_of_frames(scores: Tensor, shares: Tensor, image: ImageTokens) -> Tensor:
    """Prompt indices of each frame's best patches by ``scores (frames, patches)``, ascending, the budget in all.

    A frame has its part ``shares (frames,)`` of the budget, by largest remainders, at least one patch if the budget suffices,
    and no more than it has; what it cannot take goes to the others.
    """
    places = image.host(image.layout.placeholder)
    count = min(image.count, sum(image.layout.available))
    place = ranks(scores.nan_to_num(nan=-1e9).masked_fill(places < 0, -torch.inf))
    # Seat r of a frame of quota q is worth q - (r + 1); rounded, so that quotas that differ by rounding errors are equal.
    worth = ((count * shares).mul(1e3).round() / 1e3)[:, None] - (place + 1)
    if count >= sum(map(bool, image.layout.available)):
        worth = worth.masked_fill(place == 0, torch.inf)
    return with_separators(places.flatten()[top(worth.masked_fill(places < 0, -torch.inf).flatten(), count)], image)
