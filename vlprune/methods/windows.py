"""Square windows of neighbouring patches: where they are, how many a budget merges, which are alike, and merging them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlprune.image import ImageLayout, VisionTokens, remembered, top
from vlprune.method import Merge, Selection
from vlprune.methods.salience import number_or_lowest


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


def mergeable(layout: ImageLayout, side: int) -> int:
    """Windows that each tile of the image has to merge: all but those that straddle the edge of the picture."""
    _, inside, outside = windows_of(layout, side)
    return int((inside | outside).sum(1).min())


def left_by_merging(layout: ImageLayout, side: int, merges: int) -> list[int]:
    """Patches of each tile that are in the prompt once ``merges`` of its windows are merged, those in the padding first."""
    _, _, outside = windows_of(layout, side)
    lost = side**2 - 1
    return [n - lost * max(0, merges - free) for n, free in zip(layout.available, outside.sum(1).tolist(), strict=True)]


def merges_within(layout: ImageLayout, side: int, share: float, count: int, fits: Callable[[int], bool]) -> int | None:
    """Windows to merge in each tile: the part ``share`` of them, fewer where less than ``count`` patches of the image would be
    left, more until so many ``fits``; None if not even all of them do."""
    most = mergeable(layout, side)
    wished = min(int(share * windows_of(layout, side)[0].shape[0]), most)
    start = max((n for n in range(1, wished + 1) if sum(left_by_merging(layout, side, n)) >= count), default=0)
    return next((n for n in range(start, most + 1) if fits(n)), None)


def likeness(hidden: Tensor, layout: ImageLayout, side: int) -> tuple[Tensor, Tensor]:
    """The windows, as in :func:`windows_of`, and how much each asks to be merged: ``(tiles, windows)``.

    That is the mean cosine similarity of all pairs of its rows of ``hidden (tiles, patches, D)``; infinite for windows in the
    padding, and minus infinity for those that straddle its edge.
    """
    windows, inside, outside = (t.to(hidden.device, non_blocking=True) for t in windows_of(layout, side))
    members = torch.nn.functional.normalize(hidden, dim=-1)[:, windows]
    # The square of the sum of unit vectors holds every pair twice, and each vector with itself once.
    pairs = members.sum(2).square().sum(-1) - members.square().sum((2, 3))
    alike = number_or_lowest(pairs / (windows.shape[1] * (windows.shape[1] - 1)))
    return windows, alike.masked_fill(~inside, -torch.inf).masked_fill(outside, torch.inf)


def merge_alike(tokens: VisionTokens, side: int, merges: int | None, threshold: float = 0.0) -> Selection | None:
    """Merges the ``merges`` windows of each tile that ask for it most; None if there are none.

    Without ``merges`` as many as every tile has of a likeness of ``threshold`` or more, for which the host waits.
    """
    windows, alike = likeness(tokens.hidden.float(), tokens.layout, side)
    if merges is None:
        merges = int((alike >= threshold).sum(1).min())
    return merge(windows[top(alike, merges)], tokens.hidden.shape[1]) if merges else None


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
