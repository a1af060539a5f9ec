"""MCTF: rows merge that are alike, get little attention, and are small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vlprune import options
from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.errors import OptionError
from vlprune.image import top
from vlprune.kernels import bipartite_match, merge_rows
from vlprune.method import register
from vlprune.methods.assigning import numbered, staying
from vlprune.schedule import counts_of, solved


@register("mctf")
@dataclass(kw_only=True)
class MCTF(BlockMethod):
    """Multi-Criteria Token Fusion (CVPR 2024): similarity, information and size decide together, in both directions.

    The weight of a pair is ``((1 + cosine) / 2) ** (1 / t1) * (u u') ** (1 / t2) * (z z') ** (1 / t3)``, where u is one over
    the attention that a row receives and z one over its size. Rows at even places go into their best partner at odd places,
    half of those that leave; then rows at odd places go into what is left at even ones.
    """

    paper: ClassVar[str] = (
        "Lee et al., Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers, CVPR 2024, "
        "arXiv:2403.10030"
    )
    reads: ClassVar[tuple[str, ...]] = ("queries",)
    budget: int | float = 0.5
    r: int | None = None
    """Rows that each block but the first merges away, in place of the budget."""
    temperatures: Sequence[float] = (1.0, 20.0, 40.0)
    """Of similarity, information and size: the higher, the less it counts."""
    pooling: Literal["size", "attention"] = "size"
    """What weighs the rows of a mean: their sizes, or sizes times the attention they receive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.temperatures = list(self.temperatures)
        if len(self.temperatures) != 3 or not all(0 < t < float("inf") for t in self.temperatures):
            raise OptionError(f"temperatures={self.temperatures!r}: allowed are three numbers above 0")
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 0):
            raise OptionError(f"r={self.r!r}: allowed are an int >= 0, and None")
        options.one_of("pooling", self.pooling, ("size", "attention"))

    def counts(self, tokens: int, blocks: int) -> list[int]:
        if self.r is None:
            return solved(self.budget, tokens, blocks, first=1)
        return counts_of([0] + [self.r] * (blocks - 1), tokens)

    def reduce(self, tokens: BlockTokens) -> Tensor:
        rows, prefix, leaving = tokens.hidden.shape[1], tokens.prefix, tokens.leaving
        even, odd = slice(prefix + prefix % 2, rows, 2), slice(prefix + 1 - prefix % 2, rows, 2)
        # What is no number pairs with nobody in particular: a partner that has left must not come out of it.
        unit = functional.normalize(tokens.hidden.float(), dim=-1).nan_to_num(0.0)
        own = self.readiness(tokens)
        into = staying(unit)
        forth, partner = self.best(unit[:, even], own[:, even], unit[:, odd], own[:, odd])
        first = top(forth, leaving // 2)
        into[:, even] = into[:, even].scatter(1, first, into[:, odd].gather(1, partner.gather(1, first)))
        left = torch.ones_like(forth, dtype=torch.bool).scatter(1, first, False)
        back, partner = self.best(unit[:, odd], own[:, odd], unit[:, even], own[:, even], left)
        second = top(back, leaving - leaving // 2)
        into[:, odd] = into[:, odd].scatter(1, second, staying(unit)[:, even].gather(1, partner.gather(1, second)))
        into = into.gather(1, into)  # what went into a row that then leaves goes along
        behind = staying(unit)
        behind[:, odd] += rows
        return numbered(into, behind)

    def readiness(self, tokens: BlockTokens) -> Tensor:
        """``(B, N)`` in (0, 1]: information and size of a row alone, the higher the readier it is to merge."""
        _, information, size = self.temperatures
        received, sizes = attention_received(tokens).nan_to_num(1.0).clamp(min=1e-30), tokens.sizes.clamp(min=1e-30)
        logs = -(received.log() / information + sizes.log() / size)
        return (logs - logs.amax(1, keepdim=True)).exp()

    def best(
        self, source: Tensor, ready: Tensor, target: Tensor, ready_target: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weight of each source's best pair and its target, both ``(B, S)``.

        Raised to t1, the part that differs among targets is ``(1 + cosine) / 2 * ready ** t1``: a dot product.
        """
        power = self.temperatures[0]
        left = torch.cat([source, torch.ones_like(source[..., :1])], -1) / 2
        right = torch.cat([target, torch.ones_like(target[..., :1])], -1) * (ready_target**power)[..., None]
        value, index = bipartite_match(left, right, normalise=False, valid=valid)
        return value.clamp(min=0) ** (1 / power) * ready, index

    def merge(self, tokens: BlockTokens, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self.pooling == "size":
            return super().merge(tokens, assigned, count)
        means, _ = merge_rows(tokens.hidden, assigned, tokens.sizes * attention_received(tokens), count)
        return means, torch.zeros_like(tokens.sizes[:, :count]).scatter_add(1, assigned, tokens.sizes)


def attention_received(tokens: BlockTokens) -> Tensor:
    """``(B, N)`` float32: attention that a row receives, the mean over queries and heads."""
    there = (tokens.sizes > 0).float()
    return tokens.read.received(there / there.sum(1, keepdim=True)).mean(1)
