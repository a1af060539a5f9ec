"""One image as a method sees it: features in prompt order, tiles, and the map between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vlprune.signals import Signal


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Where the tokens of an image lie, known from its size alone.

    ``total``: visual tokens in the prompt, row ends (newlines) included.
    ``placeholder (tiles, patches)``: index of a patch in the prompt's run of placeholders, -1 where the model's own
    unpadding removed it. Patches of a tile are in raster order; tile 0 is the thumbnail where ``thumbnail`` is true.
    ``grid``: patch rows and columns of a tile. ``crops``: tile rows and columns of the tiles that are not the thumbnail.
    ``regions``: rectangles ``(rows, columns)`` of prompt indices that cover all patches: the thumbnail, and the crops
    stitched together and unpadded. All tensors are int64 on the CPU.
    """

    total: int
    placeholder: Tensor
    grid: tuple[int, int]
    thumbnail: bool
    crops: tuple[int, int]
    regions: tuple[Tensor, ...]

    @property
    def tiles(self) -> int:
        return self.placeholder.shape[0]

    @cached_property
    def available(self) -> list[int]:
        """Patches of each tile that are in the prompt."""
        return (self.placeholder >= 0).sum(1).tolist()

    @cached_property
    def separators(self) -> Tensor:
        """Prompt indices that belong to no patch (row ends), ascending."""
        free = torch.ones(self.total, dtype=torch.bool)
        free[self.placeholder[self.placeholder >= 0]] = False
        return free.nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """One image between encoder and LLM.

    ``features (N, D)``: projected features of the image's run of placeholders, in the model's dtype.
    ``count``: how many of them the budget keeps. ``signals``: what the method asked for, see :mod:`vlprune.signals`.
    """

    features: Tensor
    layout: ImageLayout
    count: int
    signals: dict[Signal, Tensor] = field(default_factory=dict)

    def __getitem__(self, signal: Signal) -> Tensor:
        return self.signals[signal]

    @property
    def device(self) -> torch.device:
        return self.features.device

    def host(self, indices: Tensor) -> Tensor:
        """A tensor of the layout on the features' device."""
        return indices.to(self.device, non_blocking=True)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices ``(..., count)`` of the highest ``scores (..., N)``, best first: higher score, then lower index.

    The order is the same on every device. NaN counts as the lowest score.
    """
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return ranked.sort(dim=-1, descending=True, stable=True).indices[..., :count]


@lru_cache(maxsize=256)
def centres(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Raster indices of the patches of ``grid`` that lie at the centres of ``cells`` (rows, columns) equal parts."""
    row, column = ((torch.arange(n) * 2 + 1) * size // (2 * n) for size, n in zip(grid, cells, strict=True))
    return (row[:, None] * grid[1] + column).flatten()
