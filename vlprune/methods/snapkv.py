"""SnapKV: the KV cache keeps what the end of the prompt looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.image import CacheTokens, ImageLayout, ModelShape, top
from vlprune.method import Method, Plan, Selection, register
from vlprune.signals import QueryAttention, Signal


@register("snapkv")
@dataclass(kw_only=True)
class SnapKV(Method):
    """SnapKV: after the prompt each head's cache keeps the visual tokens that the last text tokens attended to.

    In each layer and for each head of keys and values, a visual token's score is the attention that the last ``window`` text
    tokens of the prompt pay to it, averaged over them and over the query heads that share the head; scores are smoothed
    over ``kernel`` neighbours in the image's run, so that a detail keeps its surroundings. The ``budget`` best stay; text
    is never evicted. The prompt is read whole, so this saves memory and time of each new token, and nothing before.

    ``window``: text tokens that vote. ``kernel``: odd width of the average pooling; 1 for none.

    Deviations from the official code: it evicts text outside of its window, too, and its window may hold visual tokens if the
    prompt ends with an image; it stores keys and values for each query head, here they stay grouped (scores are
    averaged over the group); ties go to the earlier token; what is kept stays in order.
    """

    paper: ClassVar[str] = "Li et al., SnapKV, NeurIPS 2024, arXiv:2404.14469"

    budget: int | float = 0.2
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise OptionError(f"window={self.window!r}: allowed is a number of text tokens from 1 on")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"kernel={self.kernel!r}: allowed is an odd number from 1 on")

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(self._votes(layer) for layer in range(shape.text_layers))

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        count = self.count(layout.total)
        return Plan(layout.total, cached=dict.fromkeys(range(shape.text_layers), count) if count < layout.total else {})

    def evict(self, tokens: CacheTokens) -> Selection:
        votes = tokens[self._votes(tokens.layer)][:, 0]  # (heads, N)
        heads = tokens.keys.shape[0]
        scores = self._smoothed(votes.view(heads, -1, votes.shape[-1]).mean(1))
        return Selection(top(scores, tokens.count).sort(dim=-1).values)

    def _smoothed(self, scores: Tensor) -> Tensor:
        return F.avg_pool1d(scores[None], self.kernel, stride=1, padding=self.kernel // 2)[0]

    def _votes(self, layer: int) -> QueryAttention:
        return QueryAttention(layer, queries=self.window, mean_queries=True)
