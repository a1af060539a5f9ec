"""EViT: a few blocks keep the rows that [CLS] attends to, and make one row of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.kernels import merge_rows
from vlprune.method import register
from vlprune.methods.assigning import lowest, numbered, staying
from vlprune.schedule import quarters, staged_exactly


@register("evit")
@dataclass(kw_only=True)
class EViT(BlockMethod):
    """Expediting Vision Transformers (ICLR 2022): the patches with the highest attention of [CLS] stay.

    The others become one row, their sum weighted by that attention, which then is a row like any other; or they are dropped.
    """

    paper: ClassVar[str] = (
        "Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, "
        "ICLR 2022, arXiv:2202.07800"
    )
    reads: ClassVar[tuple[str, ...]] = ("queries",)
    needs_cls: ClassVar[bool] = True
    budget: int | float = 0.5
    keep: float | None = None
    """Share of its rows that each block of ``at`` keeps, in place of the budget."""
    at: Sequence[int] | None = None
    """Blocks from 0; None for a quarter, half and three quarters of the depth: 3, 6 and 9 of twelve."""
    fuse: bool = True
    """Whether what leaves becomes one row; it is dropped otherwise, which the field calls top-k."""
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not 0 < self.keep <= 1:
            raise OptionError(f"keep={self.keep!r}: allowed are a number above 0, up to 1, and None")

    def counts(self, tokens: int, blocks: int) -> list[int]:
        at = chosen_blocks(self.at, blocks)
        if self.keep is None:
            return staged_exactly(self.budget, tokens, blocks, at)
        counts = []
        for block in range(blocks):
            if block in at:
                # The fused row comes on top; where nothing else would leave, there is none.
                tokens = min(tokens, math.ceil(self.keep * tokens) + self.fuse)
            counts.append(tokens)
        return counts

    @property
    def drops(self) -> bool:
        return not self.fuse

    def leaves(self, tokens: BlockTokens) -> Tensor:
        """``(B, N)`` bool: the rows that leave, or go into the fused one."""
        return lowest(tokens.read.of_cls(), tokens.prefix, tokens.leaving + self.fuse)

    def reduce(self, tokens: BlockTokens) -> Tensor:
        leaves = self.leaves(tokens)
        assigned = numbered(torch.where(leaves, -1, staying(tokens.hidden)))
        return torch.where(leaves, tokens.count - 1, assigned) if self.fuse else assigned

    def merge(self, tokens: BlockTokens, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if not self.fuse:
            return super().merge(tokens, assigned, count)
        weights = torch.where(assigned == count - 1, tokens.read.of_cls(), 1.0)
        means, mass = merge_rows(tokens.hidden, assigned, weights, count)
        sizes = tokens.sizes.new_zeros(mass.shape).scatter_add(1, assigned, tokens.sizes)
        return means * mass[..., None].to(means.dtype), sizes


def chosen_blocks(at: Sequence[int] | None, blocks: int) -> list[int]:
    """``at`` of a model with so many blocks. Raises :class:`OptionError` for blocks that it does not have."""
    if at is None:
        return quarters(blocks)
    if any(isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < blocks for block in at):
        raise OptionError(f"at={list(at)!r}: allowed are blocks of the model, ints from 0 to {blocks - 1}, and None")
    return sorted(set(at))
