"""TNT: a linear score for each row, learned by adding noise to what scores low; and duplicates leave first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlprune import options
from vlprune.blocks import BlockTokens
from vlprune.image import remembered, top
from vlprune.kernels import bipartite_match
from vlprune.method import register
from vlprune.methods.assigning import lowest, numbered, staying, taken
from vlprune.methods.learned import BlockHeads, LearnedMethod, with_protected


class TNTHeads(BlockHeads):
    """A linear score of a normalised row for each stage."""

    method = "tnt"

    def __init__(self, width: int, stages: Sequence[int]):
        super().__init__(width, stages)
        self.linears = nn.ModuleList(nn.Linear(width, 1) for _ in self.stages)

    @classmethod
    def default_stages(cls, blocks: int) -> tuple[int, ...]:
        """Blocks 2, 3 and 4 of twelve, and alike elsewhere."""
        return tuple(sorted({max(1, round(blocks * stage / 12)) for stage in (2, 3, 4)}))

    def scores(self, tokens: BlockTokens, keep: Tensor | None = None) -> Tensor:
        rows = functional.layer_norm(tokens.hidden[:, tokens.prefix :].float(), (self.width,))
        return self.linears[self.stages.index(tokens.block)](rows)[..., 0]


@register("tnt")
@dataclass(kw_only=True)
class TNT(LearnedMethod):
    """Training Noise Token Pruning (2024): rows leave by a linear score that was learned while noise hid what scored low.

    Where the first rows leave, the share ``similar`` of those that leave are duplicates: rows are divided at random into two
    halves, and of one half those leave that are most similar to one of the other. The draw is by ``seed`` and the number of
    rows; in the official code it is another one each time. Scores are of normalised rows, in training and afterwards.
    """

    paper: ClassVar[str] = "Rao et al., Training Noise Token Pruning, 2024, arXiv:2411.18092"
    kind: ClassVar[type[BlockHeads]] = TNTHeads
    similar: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("similar", self.similar)

    def reduce(self, tokens: BlockTokens) -> Tensor:
        scores = with_protected(self.scores(tokens), tokens.prefix)
        patches = scores.shape[1] - tokens.prefix
        if tokens.block == self._heads.stages[0]:
            kept = patches - tokens.leaving
            # Half of what the scores leave over can be duplicates of the other half, at most.
            duplicates = min(round(self.similar * tokens.leaving), kept)
            leaves = lowest(scores, tokens.prefix, tokens.leaving - duplicates)
            leaves = self._without_duplicates(tokens, scores, leaves, kept + duplicates, duplicates)
        else:
            leaves = lowest(scores, tokens.prefix, tokens.leaving)
        return numbered(staying(tokens.hidden).masked_fill(leaves, -1))

    def _without_duplicates(self, tokens: BlockTokens, scores: Tensor, leaves: Tensor, left: int, duplicates: int) -> Tensor:
        """``leaves (B, N)`` and ``duplicates`` more of the ``left`` unprotected rows that would stay."""
        stay = top(scores.masked_fill(leaves, -torch.inf)[:, tokens.prefix :], left) + tokens.prefix
        order = _draw(self.seed, left).to(stay.device)
        half = max(duplicates, left // 2)
        sources, targets = stay[:, order[:half]], stay[:, order[half:]]
        similarity, _ = bipartite_match(taken(tokens.hidden, sources), taken(tokens.hidden, targets))
        return leaves.scatter(1, sources.gather(1, top(similarity, duplicates)), True)


@torch.compiler.assume_constant_result
def _draw(seed: int, count: int) -> Tensor:
    """An order of ``count``, which a compiled model holds as a constant: a generator cannot be part of a graph."""
    return _remembered_draw(seed, count)


@remembered
def _remembered_draw(seed: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
