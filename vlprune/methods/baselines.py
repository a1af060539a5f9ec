"""Baselines that look at nothing: random, uniform, pool, resize. A table without them says nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.image import ImageLayout, ImageTokens, centres, remembered
from vlprune.method import Merge, Method, Selection, register
from vlprune.methods.grids import divided, with_separators


@register("random")
@dataclass(kw_only=True)
class Random(Method):
    """Random tokens: a fixed draw by ``seed``, from patches and row ends alike.

    The draw depends on the seed and on how many tokens the image has, so results do not depend on batches or on what
    came before; images of equal size lose the same places. Average over several seeds where that matters.
    """

    seed: int = 0

    def select(self, image: ImageTokens) -> Selection:
        return Selection(image.host(_draw(self.seed, image.layout.total, image.count)))


@remembered
def _draw(seed: int, total: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values


@register("uniform")
@dataclass(kw_only=True)
class Uniform(Method):
    """An even grid: the centre of each of ``count`` rectangles that divide the thumbnail and the picture of the crops."""

    def select(self, image: ImageTokens) -> Selection:
        places, _ = divided(image.layout, _patches(image))
        return Selection(with_separators(image.host(places), image))


@register("pool")
@dataclass(kw_only=True)
class Pool(Method):
    """Average pooling of projected features: each of ``count`` rectangles becomes its mean, at the place of its centre."""

    def select(self, image: ImageTokens) -> Selection:
        places, cell = divided(image.layout, _patches(image))
        keep = with_separators(image.host(places), image)
        slot = torch.searchsorted(keep, image.host(places))
        cell = image.host(cell)
        target = torch.where(cell < 0, -1, slot[cell.clamp(min=0)])
        return Selection(keep, Merge(target))


@register("resize")
@dataclass(kw_only=True)
class Resize(Method):
    """A smaller image: the vision encoder sees every tile at a lower resolution, which saves its time too.

    Tiles shrink to the smallest grid of patches of about their own shape that gives ``count`` tokens or more, position
    embeddings are interpolated, and every so-manieth token over the budget is left out. Features go to the places of
    their patches' centres on the full grid.
    """

    def encoder_grid(self, layout: ImageLayout) -> tuple[int, int]:
        return _smaller(layout, min(self.count(layout.total), sum(layout.available)))

    def select(self, image: ImageTokens) -> Selection:
        count = _patches(image)
        places = _places(image.layout, self.encoder_grid(image.layout))
        even = torch.arange(count) * places.shape[0] // count
        return Selection(with_separators(image.host(places[even]), image))


def _patches(image: ImageTokens) -> int:
    """How many patches the budget keeps; row ends come only where it exceeds them."""
    return min(image.count, sum(image.layout.available))


@remembered
def _smaller(layout: ImageLayout, count: int) -> tuple[int, int]:
    rows, columns = layout.grid
    candidates = [
        (r, c)
        for r in range(1, rows + 1)
        for c in range(1, columns + 1)
        if 0.7 <= (r * columns) / (c * rows) <= 1.43 or (r, c) == layout.grid
    ]
    candidates.sort(key=lambda grid: (grid[0] * grid[1], abs(grid[0] * columns - grid[1] * rows), grid))
    return next(grid for grid in candidates if _places(layout, grid).shape[0] >= count)


@remembered
def _places(layout: ImageLayout, grid: tuple[int, int]) -> Tensor:
    """Prompt indices, ascending, of the patches of all tiles that ``grid`` fills."""
    places = layout.placeholder[:, centres(layout.grid, grid)]
    return places[places >= 0].sort().values
