"""DynamicViT: small predictors tell which rows go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlprune.blocks import BlockTokens
from vlprune.method import register
from vlprune.methods.learned import BlockHeads, LearnedMethod


class Predictor(nn.Module):
    """Log-probabilities ``(B, n, 2)`` of keeping and of dropping rows ``(B, n, C)``.

    Half of a row's features are its own, the other half are replaced by their mean over the rows that are still there.
    """

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        half, quarter = max(1, width // 2), max(1, width // 4)
        self.outer = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2), nn.LogSoftmax(-1)
        )

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        x = self.inner(x)
        own, shared = x.split([x.shape[-1] - x.shape[-1] // 2, x.shape[-1] // 2], -1)
        weight = torch.ones_like(x[..., :1]) if keep is None else keep[..., None]
        mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-6)
        return self.outer(torch.cat([own, mean.expand_as(shared)], -1))


class DynamicViTHeads(BlockHeads):
    method = "dynamicvit"

    def __init__(self, width: int, stages: Sequence[int]):
        super().__init__(width, stages)
        self.predictors = nn.ModuleList(Predictor(width) for _ in self.stages)

    def decisions(self, tokens: BlockTokens, keep: Tensor | None) -> Tensor:
        """Log-probabilities ``(B, N - prefix, 2)`` of keeping and dropping."""
        predictor = self.predictors[self.stages.index(tokens.block)]
        return predictor(tokens.hidden[:, tokens.prefix :].float(), keep)

    def scores(self, tokens: BlockTokens, keep: Tensor | None = None) -> Tensor:
        return self.decisions(tokens, keep)[..., 0]


@register("dynamicvit")
@dataclass(kw_only=True)
class DynamicViT(LearnedMethod):
    """Dynamic Token Sparsification (NeurIPS 2021): in three blocks a small predictor scores the rows.

    The paper trains the backbone, too; here the predictors alone learn, by the same losses, from what the unpruned model says.
    Rows leave between attention and MLP of a block, in the paper in front of it.
    """

    paper: ClassVar[str] = "Rao et al., DynamicViT: Dynamic Token Sparsification, NeurIPS 2021, arXiv:2106.02034"
    kind: ClassVar[type[BlockHeads]] = DynamicViTHeads
