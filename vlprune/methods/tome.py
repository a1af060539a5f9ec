"""ToMe: in every block the most similar pairs of rows become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.kernels import bipartite_match
from vlprune.method import register
from vlprune.schedule import counts_of, linear


@register("tome")
@dataclass(kw_only=True)
class ToMe(BlockMethod):
    """Token Merging (ICLR 2023): bipartite soft matching of a block's keys, merged by size-weighted means.

    Rows at even places are sources, those at odd places targets; each source looks for its most similar target, and the
    ``r`` sources with the highest similarities are merged into theirs. The new order is: protected rows, sources that are
    left, targets. So the next block pairs other rows.
    """

    paper: ClassVar[str] = "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461"
    budget: int | float = 0.5
    r: int | Sequence[int] | None = None
    """Rows that each block merges away, in place of the budget: one number, or one for each block (none where it ends)."""
    inflection: float = 0.0
    """For one number ``r``: -1 merges more in early blocks, down to none in the last; 1 the reverse; 0 the same in all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = [] if self.r is None else self.r if isinstance(self.r, Sequence) else [self.r]
        if any(isinstance(rate, bool) or not isinstance(rate, int) or rate < 0 for rate in rates):
            raise OptionError(f"r={self.r!r}: allowed are an int >= 0, a list of them, one a block, and None")
        if not -1 <= self.inflection <= 1:
            raise OptionError(f"inflection={self.inflection!r}: allowed is a number from -1 to 1")

    def counts(self, tokens: int, blocks: int) -> list[int]:
        if self.r is None:
            return super().counts(tokens, blocks)
        rates = linear(self.r, self.inflection, blocks) if isinstance(self.r, int) else [*self.r, *[0] * blocks][:blocks]
        return counts_of(rates, tokens)

    def reduce(self, tokens: BlockTokens) -> Tensor:
        return assignment(tokens.keys, tokens.prefix, tokens.leaving)


def assignment(metric: Tensor, prefix: int, leaving: int) -> Tensor:
    """The output row ``(B, N)`` of every row of ``metric (B, N, d)``; ``leaving`` of them share one with another row.

    Of equally similar targets the first one wins, of equally similar sources the earlier one is merged.
    """
    batch, rows, _ = metric.shape
    # Which rows are sources depends on their place in the whole sequence, protected rows included.
    sources, targets = slice(prefix + prefix % 2, rows, 2), slice(prefix + 1 - prefix % 2, rows, 2)
    similarity, best = bipartite_match(metric[:, sources], metric[:, targets])
    chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, :leaving]
    leaves = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, chosen, True)
    first_target = prefix + similarity.shape[1] - leaving
    assigned = torch.arange(rows, device=metric.device).repeat(batch, 1)
    assigned[:, sources] = torch.where(leaves, first_target + best, prefix + (~leaves).cumsum(1) - 1)
    assigned[:, targets] = first_target + torch.arange(rows - prefix - similarity.shape[1], device=metric.device)
    return assigned
