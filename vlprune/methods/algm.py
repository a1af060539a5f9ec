"""ALGM: neighbours that look alike merge early, whatever is alike merges later; made for segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import BudgetError, OptionError
from vlprune.image import top
from vlprune.kernels import bipartite_match
from vlprune.method import register
from vlprune.methods.assigning import numbered, staying, taken
from vlprune.methods.evit import chosen_blocks
from vlprune.schedule import staged_pairs


@register("algm")
@dataclass(kw_only=True)
class ALGM(BlockMethod):
    """Adaptive Local-then-Global Merging (CVPR 2024): 2 x 2 windows of patches first, pairs of the whole image later.

    With a budget, the windows merge whose patches are most alike, then the pairs. With a threshold, all windows as similar as
    that, then all pairs that stand out among the image's pairs, so that the number of rows depends on the image.
    """

    paper: ClassVar[str] = (
        "Norouzi et al., ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic Segmentation with Plain Vision "
        "Transformers, CVPR 2024, arXiv:2406.09936"
    )
    budget: int | float = 0.5
    threshold: float | None = None
    """Mean cosine from which a window merges, in place of the budget; 0.88 in the paper."""
    at: Sequence[int] | None = None
    """The block that merges windows and the one that merges pairs, from 0; None for the first and that behind a third."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches, where the image is no square."""
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise OptionError(f"threshold={self.threshold!r}: allowed are a cosine, from -1 to 1, and None")
        if self.at is not None and (len(self.at) != 2 or self.at[0] >= self.at[1]):
            raise OptionError(f"at={self.at!r}: allowed are two blocks, that of the windows first, and None")
        self.grid = None if self.grid is None else (int(self.grid[0]), int(self.grid[1]))

    @property
    def adaptive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold is not None

    def where(self, blocks: int) -> list[int]:
        """The block of the windows, and that of the pairs."""
        return [0, max(1, blocks // 3)] if self.at is None else chosen_blocks(self.at, blocks)

    def acts(self, block: int, blocks: int) -> bool:
        return self.adaptive and block in self.where(blocks)

    def counts(self, tokens: int, blocks: int) -> list[int]:
        if self.threshold is not None:
            return [tokens] * blocks
        return staged_pairs(self.budget, tokens, blocks, self.where(blocks))

    def reduce(self, tokens: BlockTokens) -> Tensor:
        unit = functional.normalize(tokens.hidden.float(), dim=-1).nan_to_num(0.0)
        if tokens.block == self.where(tokens.blocks)[0]:
            return self.local(unit, tokens)
        return self.pairs(unit, tokens)

    def local(self, unit: Tensor, tokens: BlockTokens) -> Tensor:
        """Windows become one row each, in front of the rows that are left."""
        cells = windows(self.shape(unit.shape[1] - tokens.prefix)).to(unit.device) + tokens.prefix
        if tokens.leaving > 3 * len(cells):
            raise BudgetError(
                f"{tokens.leaving} rows are to leave in block {tokens.block}, and {len(cells)} windows of 2 x 2 patches can "
                f"merge {3 * len(cells)} away; allowed are a larger budget, or a method without windows"
            )
        alike = similarity(unit, cells)
        if self.threshold is None:
            # Each of the most similar windows loses three rows, and the last of them what then is left to lose.
            rank = torch.zeros_like(alike, dtype=torch.int64)
            rank = rank.scatter(1, top(alike, len(cells)), staying(alike))
            lost = (tokens.leaving - 3 * rank).clamp(0, 3)
        else:
            lost = torch.where(alike >= self.threshold, 3, 0)
        first = cells[:, :1].expand(-1, 4)
        place = torch.arange(4, device=unit.device)
        into = staying(unit)
        into[:, cells.flatten()] = torch.where(place <= lost[..., None], first, cells).flatten(1)
        behind = staying(unit) + unit.shape[1]
        behind[:, : tokens.prefix] -= unit.shape[1]
        behind[:, cells[:, 0]] -= torch.where(lost > 0, unit.shape[1], 0)
        return numbered(into, behind)

    def pairs(self, unit: Tensor, tokens: BlockTokens) -> Tensor:
        """As ToMe, by the features: protected rows, sources that are left, targets."""
        prefix, rows = tokens.prefix, unit.shape[1]
        even, odd = slice(prefix + prefix % 2, rows, 2), slice(prefix + 1 - prefix % 2, rows, 2)
        there = tokens.sizes > 0
        values, best = bipartite_match(unit[:, even], unit[:, odd], valid=there[:, odd])
        into, behind = staying(unit), staying(unit)
        if self.threshold is None:
            leaves = torch.zeros_like(values, dtype=torch.bool).scatter(1, top(values, tokens.leaving), True)
        else:
            leaves = standing_out(values, there[:, even] & values.isfinite(), tokens.block + 1)
        into[:, even] = torch.where(leaves, into[:, odd].gather(1, best) if odd.start < rows else 0, into[:, even])
        behind[:, odd] += rows
        return numbered(torch.where(there, into, -1), behind)

    def shape(self, patches: int) -> tuple[int, int]:
        """Rows and columns of the patches."""
        side = math.isqrt(patches)
        rows, columns = self.grid or (side, side)
        if rows * columns != patches:
            raise OptionError(
                f"grid={self.grid!r} for {patches} patches: allowed are (rows, columns) of them; None for squares"
            )
        return rows, columns


def windows(grid: tuple[int, int]) -> Tensor:
    """``(windows, 4)`` int64: raster indices of the 2 x 2 windows of ``grid``; what is left over at its end is in none."""
    places = torch.arange(grid[0] * grid[1]).view(grid)[: grid[0] // 2 * 2, : grid[1] // 2 * 2]
    return places.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)


def similarity(unit: Tensor, cells: Tensor) -> Tensor:
    """``(B, windows)``: the mean cosine of the pairs of each window's rows, of unit rows ``(B, N, C)``."""
    index = cells.flatten().expand(len(unit), -1)
    rows = taken(unit, index).unflatten(1, (-1, 4))
    # All pairs, a row with itself too, are the square of the sum.
    return (rows.sum(2).square().sum(-1) - rows.square().sum((2, 3))) / 12


def standing_out(values: Tensor, valid: Tensor, layer: int) -> Tensor:
    """``(B, S)`` bool: similarities above the image's mean by more than their deviation over ``layer``."""
    count = valid.sum(1, keepdim=True)
    known = torch.where(valid, values, 0.0)
    mean = known.sum(1, keepdim=True) / count.clamp(min=1)
    deviation = (torch.where(valid, values - mean, 0.0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return valid & (values > mean + deviation / layer)
