"""SnapKV: the KV cache keeps what the end of the prompt looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vlprune import options
from vlprune.image import ModelShape
from vlprune.knobs import Draw
from vlprune.method import register
from vlprune.methods.kv.policy import CachePolicy
from vlprune.signals import AttentionColumns


@register("snapkv")
@dataclass(kw_only=True)
class SnapKV(CachePolicy):
    """SnapKV: after the prompt each head's cache keeps the visual tokens that the last text tokens attended to.

    In each layer and for each head of keys and values, a visual token's score is the attention that the last ``window`` text
    tokens of the prompt pay to it, averaged over the query heads that share the head; scores are smoothed
    over ``kernel`` neighbours in the image's run, so that a detail keeps its surroundings. The ``budget`` best stay; text
    is never evicted. The prompt is read whole, so this saves memory and time of each new token, and nothing before.

    ``window``: text tokens that vote. ``kernel``: odd width of the average pooling; 1 for none.

    Deviations from the official code: it evicts text outside of its window, too, and its window may hold visual tokens if the
    prompt ends with an image; it stores keys and values for each query head, here they stay grouped (scores are
    averaged over the group); ties go to the earlier token; what is kept stays in order.
    """

    paper: ClassVar[str] = "Li et al., SnapKV, NeurIPS 2024, arXiv:2404.14469"

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        options.positive("window", self.window, "number of text tokens")

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"window": draw.whole("window", 1, 64), "kernel": draw.choice("kernel", (1, 3, 5, 7, 9))}

    def votes(self, layer: int) -> AttentionColumns:
        return AttentionColumns(layer, queries=self.window)
