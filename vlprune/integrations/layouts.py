"""Layouts that several families share."""

from __future__ import annotations

import torch

from vlprune.image import ImageLayout, remembered

TESTED = ("4.57.6", "5.23.0")
"""The versions of transformers that the tests run with."""


@remembered
def tiles_in_a_row(tiles: int, grid: tuple[int, int], separators: int = 0, video: bool = False) -> ImageLayout:
    """Tiles of ``grid`` tokens one behind the other, each a rectangle of its own: the frames of a video, or tiles whose place
    in the image is not told. ``separators``: tokens at the end that belong to no patch. ``video``: they are frames.

    A single tile is the whole image, and hence its thumbnail.
    """
    rows, columns = grid
    placeholder = torch.arange(tiles * rows * columns).view(tiles, rows * columns)
    return ImageLayout(
        total=placeholder.numel() + separators,
        placeholder=placeholder,
        grid=grid,
        thumbnail=tiles == 1,
        crops=(0, 0),
        regions=tuple(placeholder.view(tiles, rows, columns)),
        video=video,
    )
