"""Square windows of neighbouring patches: where they are, how alike their patches are, and merging them."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.image import ImageLayout, remembered
from vlprune.method import Merge, Selection


@remembered
def windows_of(layout: ImageLayout, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The whole windows of ``side`` x ``side`` patches that fit into a tile, in raster order, none over another.

    Returns their patches ``(windows, side²)``, and two masks ``(tiles, windows)``: which of them lie in the picture, and
    which in the padding. Those in neither straddle its edge. All on the CPU.
    """
    rows, columns = layout.grid
    patches = torch.arange(rows * columns).view(rows, columns)
    corners = patches[: rows // side * side : side, : columns // side * side : side].flatten()
    steps = torch.arange(side)
    windows = corners[:, None] + (steps[:, None] * columns + steps).flatten()
    seen = layout.placeholder[:, windows] >= 0
    return windows, seen.all(-1), ~seen.any(-1)


def likeness(hidden: Tensor, windows: Tensor) -> Tensor:
    """Mean cosine similarity of all pairs of rows of a window: ``(tiles, windows)``, from ``hidden (tiles, n, D)``."""
    members = torch.nn.functional.normalize(hidden, dim=-1)[:, windows]
    # The square of the sum of unit vectors holds every pair twice, and each vector with itself once.
    pairs = members.sum(2).square().sum(-1) - members.square().sum((2, 3))
    return pairs / (windows.shape[1] * (windows.shape[1] - 1))


def merge(members: Tensor, patches: int) -> Selection:
    """Each window becomes its plain average, at the place of its central patch; other rows stay as they are.

    ``members (tiles, chosen, side²)``: rows of the chosen windows, of ``patches`` rows in a tile.
    """
    tiles, chosen, size = members.shape
    side = round(size**0.5)
    centre = members[..., side // 2 * (side + 1)]
    stays = torch.ones(tiles, patches, dtype=torch.bool, device=members.device)
    stays = stays.scatter(1, members.flatten(1), False).scatter(1, centre, True)
    keep = stays.sort(dim=1, descending=True, stable=True).indices[:, : patches - chosen * (size - 1)]
    slots = stays.cumsum(1).gather(1, centre) - 1
    target = torch.full_like(stays, -1, dtype=torch.long)
    return Selection(keep, Merge(target.scatter(1, members.flatten(1), slots.repeat_interleave(size, 1))))
