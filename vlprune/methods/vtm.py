"""Video token merging: a learned saliency chooses the rows into which the others merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlprune.blocks import BlockTokens
from vlprune.image import top
from vlprune.kernels import bipartite_match, merge_rows
from vlprune.method import register
from vlprune.methods.assigning import numbered, staying, taken
from vlprune.methods.learned import BlockHeads, LearnedMethod, with_protected


class VTMHeads(BlockHeads):
    """One vector for each stage; the saliency of a row is the hyperbolic tangent of its product with the normalised row."""

    method = "vtm"

    def __init__(self, width: int, stages: Sequence[int]):
        super().__init__(width, stages)
        self.vectors = nn.ParameterList(torch.zeros(width) for _ in self.stages)

    def scores(self, tokens: BlockTokens, keep: Tensor | None = None) -> Tensor:
        rows = nn.functional.layer_norm(tokens.hidden[:, tokens.prefix :].float(), (self.width,))
        return torch.tanh(rows @ self.vectors[self.stages.index(tokens.block)] / self.width**0.5)


@register("vtm")
@dataclass(kw_only=True)
class VTM(LearnedMethod):
    """Learnable Video Token Merging (NeurIPS 2024): the most salient rows are targets, the others merge into the most alike.

    Built from public summaries, since no code is public. Deviations: targets are the most salient rows rather than a draw by
    saliency; every other row is a source, and as many merge as the budget asks for, the most similar first; rows of one image
    or clip are compared all with all, not within runs of frames; saliency reads normalised rows rather than keys.
    """

    paper: ClassVar[str] = "Lee et al., Video Token Merging for Long-form Video Understanding, NeurIPS 2024, arXiv:2410.23782"
    kind: ClassVar[type[BlockHeads]] = VTMHeads
    share: float = 0.2
    """Of the rows that stay, at least so many are targets, or all where more have to merge."""

    def merge(self, tokens: BlockTokens, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Plain means: by the paper those weighted by size are worse."""
        means, _ = merge_rows(tokens.hidden, assigned, None, count)
        sizes = tokens.sizes.new_zeros(len(assigned), count).scatter_add(1, assigned, tokens.sizes)
        return means, sizes

    @property
    def drops(self) -> bool:
        return False

    def reduce(self, tokens: BlockTokens) -> Tensor:
        patches = tokens.hidden.shape[1] - tokens.prefix
        targets = min(patches - tokens.leaving, max(1, round(self.share * patches)))
        order = top(with_protected(self.scores(tokens), tokens.prefix)[:, tokens.prefix :], patches) + tokens.prefix
        salient, sources = order[:, :targets], order[:, targets:]
        similarity, best = bipartite_match(taken(tokens.hidden, sources), taken(tokens.hidden, salient))
        chosen = top(similarity, tokens.leaving)
        into, partner = sources.gather(1, chosen), salient.gather(1, best.gather(1, chosen))
        return numbered(staying(tokens.hidden).scatter(1, into, partner))
