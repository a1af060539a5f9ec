"""Even divisions of an image's rectangles, shared by the baselines, and what becomes of row ends."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.budget import apportion
from vlprune.image import ImageLayout, ImageTokens, remembered


def with_separators(keep: Tensor, image: ImageTokens) -> Tensor:
    """``keep`` in ascending order, filled up to the image's count with row ends where the patches do not suffice."""
    missing = image.count - keep.shape[0]
    if missing > 0:
        keep = torch.cat([keep, image.host(image.layout.separators[:missing])])
    return keep.sort().values


def left_by_encoder(image: ImageTokens) -> Tensor:
    """Prompt indices, ascending, of the patches that are still there; row ends left out."""
    if image.alive is not None:
        return image.alive
    places = image.layout.placeholder
    return image.host(places[places >= 0].sort().values)


@remembered
def cells(rows: int, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` rectangles of nearly equal size that cover a grid exactly.

    Returns the cell of every patch ``(rows, columns)`` and the patch at the centre of every cell ``(count,)``, as raster
    indices. Bands of rows are cut into as many cells as the grid's aspect ratio asks for.
    """
    bands = min(max(round((count * rows / columns) ** 0.5), 1), rows, count)
    while -(-count // bands) > columns:
        bands += 1
    cell = torch.empty(rows, columns, dtype=torch.long)
    centres, first = [], 0
    widths = apportion(count, [1.0] * bands, [columns] * bands)
    for band, width in enumerate(widths):
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        for part in range(width):
            left, right = part * columns // width, (part + 1) * columns // width
            cell[top:bottom, left:right] = first + part
            centres.append((top + bottom - 1) // 2 * columns + (left + right - 1) // 2)
        first += width
    return cell, torch.tensor(centres)


@remembered
def divided(layout: ImageLayout, count: int) -> tuple[Tensor, Tensor]:
    """``count`` cells over all regions of an image, each region by its size.

    Returns ``centres (count,)``, prompt indices of the cells' centres, and ``cell (total,)``, the cell of every prompt
    index, -1 for row ends.
    """
    sizes = [region.numel() for region in layout.regions]
    centres, cell, first = [], torch.full((layout.total,), -1), 0
    for region, share in zip(layout.regions, apportion(count, sizes, sizes), strict=True):
        if share == 0:
            continue
        parts, middle = cells(region.shape[0], region.shape[1], share)
        cell[region.flatten()] = parts.flatten() + first
        centres.append(region.flatten()[middle])
        first += share
    return torch.cat(centres), cell
