"""vid-TLDR: in the first blocks of a video transformer, background merges away and adds next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.kernels import merge_rows
from vlprune.method import register
from vlprune.methods.assigning import leaving
from vlprune.methods.tome import assignment
from vlprune.schedule import counts_of, staged_pairs

AT_ONCE = 2**22
"""Attention values that exist at one time, at most, unless one row of a batch has more."""


@register("vid-tldr")
@dataclass(kw_only=True)
class VidTLDR(BlockMethod):
    """Training-free token merging for Light-weight video Transformer (CVPR 2024).

    A row that attends to few others lies in the foreground: its saliency comes from the entropy of its attention. Pairs are
    those of ToMe, found by the features; a row that merges away counts by its saliency, and not at all below the mean.
    """

    paper: ClassVar[str] = (
        "Choi et al., vid-TLDR: Training Free Token Merging for Light-weight Video Transformer, CVPR 2024, arXiv:2403.13347"
    )
    reads: ClassVar[tuple[str, ...]] = ("queries",)
    budget: int | float = 0.5
    r: Sequence[int | float] | None = None
    """Rows that the first blocks merge away, in place of the budget: counts, or below 1 shares of their rows."""
    depth: int = 4
    """With a budget: in how many of the first blocks rows merge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and any(isinstance(rate, bool) or rate < 0 or (rate >= 1 and rate % 1) for rate in self.r):
            raise OptionError(f"r={self.r!r}: allowed are a list of ints >= 0 and of numbers below 1, and None")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise OptionError(f"depth={self.depth!r}: allowed is an int >= 1")

    def counts(self, tokens: int, blocks: int) -> list[int]:
        if self.r is not None:
            counts = []
            for rate in [*self.r, *[0] * blocks][:blocks]:
                tokens = counts_of([int(rate if rate >= 1 else rate * tokens)], tokens)[0]
                counts.append(tokens)
            return counts
        return staged_pairs(self.budget, tokens, blocks, range(min(self.depth, blocks)))

    def reduce(self, tokens: BlockTokens) -> Tensor:
        return assignment(tokens.hidden, tokens.prefix, tokens.leaving)

    def merge(self, tokens: BlockTokens, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Means weighted by size, and by saliency where a row merges away; sizes are what is left of them by that."""
        weights = torch.where(leaving(assigned, tokens.prefix), saliency(tokens), 1.0) * tokens.sizes
        return merge_rows(tokens.hidden, assigned, weights, count)


def saliency(tokens: BlockTokens) -> Tensor:
    """``(B, N)`` float32 in [0, 1]: how far a row's focus lies above the mean; 1 for all if all are alike."""
    there = (tokens.sizes > 0)[:, tokens.prefix :]
    focus = _focus(tokens)[:, tokens.prefix :]
    mean = torch.where(there, focus, 0.0).sum(1, keepdim=True) / there.sum(1, keepdim=True)
    above = torch.where(there, focus - mean, 0.0)
    highest = above.amax(1, keepdim=True)
    # Rounding alone makes differences of this kind.
    alike = highest <= 1e-5 * mean.abs().clamp(min=1e-12)
    values = torch.where(alike, 1.0, above.clamp(min=0) / highest.clamp(min=1e-30))
    return torch.cat([values.new_zeros(len(values), tokens.prefix), values], 1)


def _focus(tokens: BlockTokens) -> Tensor:
    """``(B, N)`` float32: the negative entropy of each row's attention, the mean over the heads, as if all sizes were one."""
    attention = tokens.read
    if attention.weights is not None:
        hidden = attention.weights == -torch.inf
        attention = replace(attention, weights=torch.where(hidden, -torch.inf, 0.0))
    batch, rows = tokens.sizes.shape
    step = max(1, AT_ONCE // max(1, batch * rows))
    parts = torch.arange(rows, device=tokens.sizes.device).expand(batch, -1).split(step, 1)
    maps = (attention.rows(part) for part in parts)
    return torch.cat([torch.xlogy(part, part).sum(-1) for part in maps], 1).nan_to_num(0.0)
