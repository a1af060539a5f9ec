"""DiffRate: rows that [CLS] attends to least are dropped, the next ones merged, as many as was learned for each block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vlprune import options
from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.image import top
from vlprune.kernels import bipartite_match, merge_rows
from vlprune.method import register
from vlprune.methods.assigning import numbered, staying, taken
from vlprune.schedule import solved


@register("diffrate")
@dataclass(kw_only=True)
class DiffRate(BlockMethod):
    """Differentiable Compression Rate (ICCV 2023): by the attention of [CLS] the tail is dropped, what is last then merged.

    How many rows of each block are left behind either is learned once for a model and a target (``kept``, ``merged``) and then
    fixed. Without such counts they follow from the budget, and ``pruned`` divides what leaves.
    """

    paper: ClassVar[str] = (
        "Chen et al., DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023, arXiv:2305.17997"
    )
    reads: ClassVar[tuple[str, ...]] = ("queries",)
    needs_cls: ClassVar[bool] = True
    budget: int | float = 0.5
    kept: Sequence[int] | None = None
    """Rows that each block leaves when it has dropped, protected ones not counted; in place of the budget."""
    merged: Sequence[int] | None = None
    """Rows that each block leaves when it has merged, too; in place of the budget."""
    pruned: float = 0.5
    """With a budget: the share of the rows leaving a block that is dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("pruned", self.pruned)
        options.both_or_neither(self, "kept", "merged", otherwise="the budget decides")
        for name in ("kept", "merged"):
            counts = getattr(self, name)
            if counts is not None and any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
                raise OptionError(f"{name}={counts!r}: allowed are ints >= 1, one for each block, and None")
        if self.kept is not None and self.merged is not None and len(self.kept) != len(self.merged):
            raise OptionError(f"kept has {len(self.kept)} blocks and merged {len(self.merged)}: allowed are as many")

    @classmethod
    def from_counts(cls, counts: Mapping[str, Sequence[int]], prefix: int = 0, **options: Any) -> DiffRate:
        """From ``{"kept": [...], "merged": [...]}`` of a JSON file; ``prefix``: protected rows that its numbers count, too."""
        parts = {name: [max(1, int(count) - prefix) for count in counts[name]] for name in ("kept", "merged")}
        return cls(**parts, **options)

    @property
    def drops(self) -> bool:
        return True

    def counts(self, tokens: int, blocks: int) -> list[int]:
        if self.merged is None:
            return solved(self.budget, tokens, blocks, first=1)
        if len(self.merged) != blocks:
            raise OptionError(f"merged has counts for {len(self.merged)} blocks, and the model has {blocks}")
        return [min(tokens, *self.merged[: block + 1]) for block in range(blocks)]

    def dropping(self, tokens: BlockTokens) -> int:
        """How many rows are dropped in this block; what else leaves is merged."""
        if self.kept is None:
            return math.floor(self.pruned * tokens.leaving)
        free = tokens.hidden.shape[1] - tokens.prefix
        return min(max(0, free - self.kept[tokens.block]), tokens.leaving)

    def reduce(self, tokens: BlockTokens) -> Tensor:
        prefix, rows = tokens.prefix, tokens.hidden.shape[1]
        ranked = top(tokens.read.of_cls()[:, prefix:], rows - prefix) + prefix
        stay = tokens.count - prefix
        last = rows - prefix - self.dropping(tokens)
        targets, sources, dropped = ranked[:, :stay], ranked[:, stay:last], ranked[:, last:]
        _, best = bipartite_match(taken(tokens.hidden, sources), taken(tokens.hidden, targets))
        into = staying(tokens.hidden).scatter(1, dropped, -1)
        return numbered(into.scatter(1, sources, targets.gather(1, best)))

    def merge(self, tokens: BlockTokens, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Plain means; a row adds to its target's size in proportion to the cosine of the two."""
        means, _ = merge_rows(tokens.hidden, assigned, None, count)
        stay = top(tokens.read.of_cls()[:, tokens.prefix :], count - tokens.prefix).sort(1).values + tokens.prefix
        stay = torch.cat([staying(tokens.hidden)[:, : tokens.prefix], stay], 1)
        unit = functional.normalize(tokens.hidden.detach().float(), dim=-1)
        place = assigned.clamp(min=0)
        cosine = (unit * taken(taken(unit, stay), place)).sum(-1)
        cosine = torch.where(stay.gather(1, place) == staying(tokens.hidden), 1.0, cosine)
        shares = torch.where(assigned < 0, 0.0, tokens.sizes * cosine)
        sizes = torch.zeros_like(tokens.sizes[:, :count]).scatter_add(1, place, shares)
        # Cosines below 0 could leave nothing of a size, whose logarithm is wanted; padding stays padding.
        return means, torch.where(tokens.sizes.gather(1, stay) > 0, sizes.clamp(min=1.0), 0.0)
