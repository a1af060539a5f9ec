"""ToFu: ToMe's pairs, dropped in early blocks and merged without loss of length in late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlprune import options
from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.kernels import merge_rows
from vlprune.method import register
from vlprune.methods.assigning import leaving
from vlprune.methods.tome import assignment
from vlprune.schedule import by_ratio

HOW = ("norm", "mean", "max", "prune")


@register("tofu")
@dataclass(kw_only=True)
class ToFu(BlockMethod):
    """Token Fusion (WACV 2024): where a block is far from linear, a mean of two rows is no row that it knows.

    Pairs are those of ToMe. Early blocks drop the sources, late ones put a row in place of a group that points where the mean
    points and is as long as the longest member.
    """

    paper: ClassVar[str] = (
        "Kim et al., Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024, arXiv:2312.01026"
    )
    budget: int | float = 0.5
    ratio: float | None = None
    """Share of the rows that each block keeps, in place of the budget."""
    early: Literal["norm", "mean", "max", "prune"] = "prune"
    """What becomes of a group in the first half of the blocks."""
    late: Literal["norm", "mean", "max", "prune"] = "norm"
    """And in the second half."""
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0.5 <= self.ratio <= 1:
            raise OptionError(f"ratio={self.ratio!r}: allowed is a number from 0.5 to 1, for a block pairs its rows, and None")
        options.one_of("early", self.early, HOW)
        options.one_of("late", self.late, HOW)

    def counts(self, tokens: int, blocks: int) -> list[int]:
        return super().counts(tokens, blocks) if self.ratio is None else by_ratio(self.ratio, tokens, blocks)

    def reduce(self, tokens: BlockTokens) -> Tensor:
        return assignment(tokens.keys, tokens.prefix, tokens.leaving)

    def merge(self, tokens: BlockTokens, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
        how = self.early if tokens.block < -(-tokens.blocks // 2) else self.late
        sizes = torch.zeros_like(tokens.sizes[:, :count]).scatter_add(1, assigned, tokens.sizes)
        return fused(tokens.hidden, assigned, count, tokens.prefix, how, tokens.sizes > 0), sizes


def fused(rows: Tensor, assigned: Tensor, count: int, prefix: int, how: str, there: Tensor | None = None) -> Tensor:
    """``(B, count, C)``: what becomes of the groups of ``rows (B, N, C)``; protected rows and single ones stay as they are.

    ``there (B, N)`` bool: rows that are no padding, all by default; padding adds nothing to a group.
    """
    there = torch.ones_like(assigned, dtype=torch.bool) if there is None else there
    if how == "max":
        hidden = rows.masked_fill(~there[..., None], -torch.inf)
        most = torch.full_like(rows[:, :count], -torch.inf)
        most = most.scatter_reduce(1, assigned[..., None].expand_as(rows), hidden, "amax")
        return torch.where(most == -torch.inf, 0.0, most)
    if how == "prune":
        stays = there & ~leaving(assigned, prefix)
        # Where the target is padding, its sources stand for the group.
        return merge_rows(rows, assigned, torch.where(_any(stays, assigned, count), stays, there).float(), count)[0]
    means = merge_rows(rows, assigned, there.float(), count)[0]
    if how == "mean":
        return means
    length = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32) * there
    longest = torch.zeros_like(length[:, :count]).scatter_reduce(1, assigned, length, "amax")
    own = torch.linalg.vector_norm(means, dim=-1, dtype=torch.float32)
    # Where the members cancel out there is no direction: a mean of zeros stays one.
    scale = torch.where(own > 0, longest / own.clamp(min=torch.finfo(own.dtype).tiny), 1.0)
    alone = torch.zeros_like(own).scatter_add(1, assigned, there.float()) <= 1
    return torch.where(alone[..., None], means, (means * scale[..., None]).to(means.dtype))


def _any(rows: Tensor, assigned: Tensor, count: int) -> Tensor:
    """``(B, N)`` bool: whether a row's group has one of ``rows (B, N)`` bool."""
    return torch.zeros_like(assigned[:, :count]).scatter_add(1, assigned, rows.long()).gather(1, assigned) > 0
