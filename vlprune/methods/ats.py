"""ATS: rows are sampled along the distribution of what [CLS] takes from them; a busy image keeps more than a plain one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import BudgetError, OptionError
from vlprune.method import register
from vlprune.methods.assigning import numbered, staying
from vlprune.methods.evit import chosen_blocks
from vlprune.schedule import room_of


@register("ats")
@dataclass(kw_only=True)
class ATS(BlockMethod):
    """Adaptive Token Sampling (ECCV 2022): inverse transform sampling at fixed points.

    A row's significance is the attention of [CLS] times the length of its value. Points are spread evenly over the range of
    their cumulative sum, each picks the row nearest to it, and what is picked stays. Many points pick the same row where few
    rows are significant, so the number of rows depends on the image.
    """

    paper: ClassVar[str] = (
        "Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022, arXiv:2111.15667"
    )
    reads: ClassVar[tuple[str, ...]] = ("queries", "values")
    needs_cls: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    budget: int | float = 0.5
    samples: int | None = None
    """Points, in place of the budget: at most so many rows are kept."""
    at: Sequence[int] | None = None
    """Blocks from 0; None for those behind the first quarter: 3 to 11 of twelve."""
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None and (
            isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1
        ):
            raise OptionError(f"samples={self.samples!r}: allowed are an int >= 1, and None")

    @property
    def drops(self) -> bool:
        return True

    def where(self, blocks: int) -> list[int]:
        return list(range(blocks // 4, blocks)) if self.at is None else chosen_blocks(self.at, blocks)

    def acts(self, block: int, blocks: int) -> bool:
        whole = self.samples is None and isinstance(self.budget, float) and self.budget == 1
        return block in self.where(blocks) and not whole

    def counts(self, tokens: int, blocks: int) -> list[int]:
        """The most that can be left behind each block."""
        first = min(self.where(blocks), default=blocks)
        points = self.samples
        if points is None and first < blocks:
            room = room_of(self.budget, tokens, blocks)
            points = math.floor((room - tokens * first) / (blocks - first))
            if points < 1:
                raise BudgetError(
                    f"budget={self.budget!r} of {tokens} tokens is a mean of {room / blocks:.4g} over {blocks} blocks; "
                    f"the first leave in block {first}, so that the least is {math.ceil(tokens * first / blocks) + 1} tokens"
                )
        return [tokens if block < first or points is None else min(tokens, points) for block in range(blocks)]

    def reduce(self, tokens: BlockTokens) -> Tensor:
        prefix = tokens.prefix
        there = (tokens.sizes > 0)[:, prefix:]
        picked = sampled(self.significance(tokens)[:, prefix:], there, self.samples or tokens.planned)
        stays = torch.cat([torch.ones_like(tokens.sizes[:, :prefix], dtype=torch.bool), picked], 1)
        return numbered(torch.where(stays, staying(tokens.hidden), -1))

    def significance(self, tokens: BlockTokens) -> Tensor:
        """``(B, N)`` float32: attention of [CLS] times the length of the value, all heads' one behind the other."""
        attention = tokens.read
        assert attention.values is not None
        length = torch.linalg.vector_norm(attention.values, dim=(1, 3), dtype=torch.float32)
        return attention.of_cls() * length


def sampled(significance: Tensor, there: Tensor, points: int) -> Tensor:
    """``(B, N)`` bool: rows that one of the ``points`` picks, of those that are ``there (B, N)``.

    Rows in ascending significance (of equal ones the later first) have a cumulative sum, scaled to [0, 1]; the points run from
    its lowest value above 0 up to 1, and each picks the row whose value is nearest, the lower one of two.
    """
    scores = significance.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max).clamp(min=0)
    scores = scores / scores.amax(1, keepdim=True).clamp(min=1e-30)
    scores = torch.where(there, torch.where((scores * there).sum(1, keepdim=True) > 0, scores, 1.0), -1.0)
    # Padding comes first, where no point looks.
    order = scores.flip(1).sort(dim=1, stable=True).indices
    order = scores.shape[1] - 1 - order
    real = there.gather(1, order)
    total = scores.gather(1, order).clamp(min=0).double().cumsum(1)
    low = torch.where(real, total, torch.inf).amin(1, keepdim=True)
    span = total[:, -1:] - low
    level = torch.where(span > 0, (total - low) / span, 1.0)
    level = torch.where(real, level, -torch.inf)
    start = torch.where(level > 0, level, 1.0).amin(1, keepdim=True)
    steps = torch.linspace(0, 1, points, dtype=level.dtype, device=level.device) if points > 1 else level.new_ones(1)
    wanted = start + (1 - start) * steps
    above = torch.searchsorted(level, wanted).clamp(max=level.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    nearer = wanted - level.gather(1, below) <= level.gather(1, above) - wanted
    nearest = level.gather(1, torch.where(nearer, below, above))
    picked = torch.searchsorted(level, nearest).clamp(max=level.shape[1] - 1)
    return torch.zeros_like(there).scatter(1, order.gather(1, picked), True)
