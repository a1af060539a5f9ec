"""Zero-TPrune: the attention map as a graph whose PageRank says which rows matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.blocks import BlockAttention, BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.image import top
from vlprune.kernels import attention_columns, bipartite_match
from vlprune.method import register
from vlprune.methods.assigning import lowest, numbered, staying, taken
from vlprune.methods.evit import chosen_blocks
from vlprune.schedule import quarters, staged_exactly


@register("zero-tprune")
@dataclass(kw_only=True)
class ZeroTPrune(BlockMethod):
    """Zero-TPrune (CVPR 2024): what important rows look at is important; of the unimportant the duplicates go first.

    A few blocks drop rows in three steps. The importance of all rows ranks them. Of the less important half those go that are
    most like one of the other half. The importance among what is left decides what else goes.

    Built from secondary notes, not from the official code.
    """

    paper: ClassVar[str] = (
        "Wang et al., Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained "
        "Transformers, CVPR 2024, arXiv:2305.17328"
    )
    reads: ClassVar[tuple[str, ...]] = ("queries",)
    budget: int | float = 0.5
    at: Sequence[int] | None = None
    """Blocks from 0; None for a quarter, half and three quarters of the depth."""
    similar: float = 0.25
    """Share of the rows leaving a block that go for being like others."""
    iterations: Sequence[int] = (30, 5, 1)
    """Steps of the rank in the first quarter of the blocks, in between, and in the last."""
    cls_first: bool = True
    """Whether the first protected row starts with the square root of the number of rows as its weight."""
    variance: Sequence[float] = (0.01, 0.7)
    """Heads count whose ranks, scaled to a mean of 1, vary within these limits; all where none does."""
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.iterations, self.variance = list(self.iterations), list(self.variance)
        options.share("similar", self.similar)
        if len(self.iterations) != 3 or not all(isinstance(steps, int) and steps >= 1 for steps in self.iterations):
            raise OptionError(f"iterations={self.iterations!r}: allowed are three ints >= 1")
        if len(self.variance) != 2 or not 0 <= self.variance[0] <= self.variance[1]:
            raise OptionError(f"variance={self.variance!r}: allowed are two numbers >= 0, the lower one first")

    def counts(self, tokens: int, blocks: int) -> list[int]:
        at = quarters(blocks) if self.at is None else chosen_blocks(self.at, blocks)
        return staged_exactly(self.budget, tokens, blocks, at)

    @property
    def drops(self) -> bool:
        return True

    def steps(self, block: int, blocks: int) -> int:
        """How many steps the rank takes in this block."""
        part = 0 if block < blocks / 4 else 2 if block >= blocks * 3 / 4 else 1
        return self.iterations[part]

    def reduce(self, tokens: BlockTokens) -> Tensor:
        prefix, free = tokens.prefix, tokens.hidden.shape[1] - tokens.prefix
        there = tokens.sizes > 0
        alike = min(math.floor(self.similar * tokens.leaving), free // 2)
        if alike:
            ranked = top(self.importance(tokens, there)[:, prefix:], free) + prefix
            targets, sources = ranked[:, : free - free // 2], ranked[:, free - free // 2 :]
            keys = tokens.read.keys.transpose(1, 2).flatten(2)
            values, _ = bipartite_match(taken(keys, sources), taken(keys, targets))
            there = there.scatter(1, sources.gather(1, top(values, alike)), False)
        # What has gone by now has the lowest importance there is, so it is among those that leave.
        scores = torch.where(there, self.importance(tokens, there).nan_to_num(0.0), -1.0)
        return numbered(torch.where(lowest(scores, prefix, tokens.leaving), -1, staying(scores)))

    def importance(self, tokens: BlockTokens, there: Tensor) -> Tensor:
        """``(B, N)`` float32: root of the mean square over the heads of what each row's rank is among those ``there``."""
        ranks = ranked(tokens.read, there, self.steps(tokens.block, tokens.blocks), self.cls_first and tokens.prefix > 0)
        count = there.sum(1)[:, None, None]
        ranks = torch.where(there[:, None], ranks * count / ranks.sum(2, keepdim=True).clamp(min=1e-30), 0.0)
        spread = (torch.where(there[:, None], ranks - 1, 0.0).square().sum(2) / count[..., 0]).nan_to_num(0.0)
        counts = (spread >= self.variance[0]) & (spread <= self.variance[1])
        counts = (counts | ~counts.any(1, keepdim=True)).float()[..., None]
        return ((ranks.square() * counts).sum(1) / counts.sum(1)).sqrt()


def ranked(attention: BlockAttention, there: Tensor, steps: int, cls_first: bool) -> Tensor:
    """``(B, H, N)`` float32: weights after ``steps`` along each head's attention among the rows that are ``there (B, N)``.

    In a step every row gives its weight to the rows it looks at. The map itself is not kept: its columns are summed again.
    """
    heads = attention.queries.shape[1]
    hidden = torch.where(there, 0.0, -torch.inf)
    queries, keys = (part.flatten(0, 1)[:, None] for part in replace(attention, weights=hidden).weighed())
    weights = there.float()
    if cls_first:
        weights[:, 0] = weights.sum(1).sqrt()
    weights = weights.repeat_interleave(heads, 0)
    for _ in range(steps):
        columns = attention_columns(queries, keys, weights, scaling=attention.scaling)[:, 0]
        weights = columns.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return weights.unflatten(0, (-1, heads))
