"""VL-Cache: layers share a budget by how spread their attention is, and the question decides what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlprune import budget as budgets
from vlprune import options
from vlprune.image import CacheTokens, ImageLayout, ModelShape
from vlprune.method import Plan, Selection, register
from vlprune.methods.kv.policy import CachePolicy, best
from vlprune.signals import AttentionColumns, AttentionSupport, Signal


@register("vl-cache")
@dataclass(kw_only=True)
class VLCache(CachePolicy):
    """VL-Cache: in each layer the visual tokens stay that the text behind the images attends to; dense layers keep more.

    A layer's share of the budget is in proportion to how many keys a token of that text looks at there: those with at least
    ``threshold`` times its largest attention, averaged over tokens and heads. The budget is met as a sum over the layers,
    exactly; how many entries one layer keeps depends on the content, so the host waits for these numbers, once, when the
    prompt has been read. A layer keeps at least one entry.

    ``threshold``: share of the largest attention from which on a key counts as looked at. ``by_head``: each head of keys and
    values keeps tokens of its own, as many as the others; otherwise a layer's heads keep the same.

    Deviations from the re-implementation in EffiVLM-Bench: only visual tokens are evicted, so its recent window, which is text
    here, needs no option; shares that exceed the image go to the other layers, where there they are lost; each image of each
    sample has its own counts, there the batch.
    """

    paper: ClassVar[str] = "Tu et al., VL-Cache, ICLR 2025, arXiv:2410.23317"
    adaptive = True

    threshold: float = 0.01
    by_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("threshold", self.threshold)

    @property
    def waits(self) -> bool:
        return True

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (*super().wants(shape), *self._supports(shape))

    def votes(self, layer: int) -> AttentionColumns:
        return AttentionColumns(layer, queries="after")

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total = layout.total
        return Plan(total, cached=dict.fromkeys(range(shape.text_layers), total) if self.count(total) < total else {})

    def evict(self, tokens: CacheTokens) -> Selection:
        if "left in layer 0" not in tokens.notes:
            spread = [tokens[signal].mean() for signal in self._supports(tokens.shape)]
            total = tokens.layout.total
            for layer, count in enumerate(budgets.over_layers(self.count(total), torch.stack(spread).tolist(), total)):
                # As the length of an empty tensor, which the host knows: a number in it would have to be read back.
                tokens.notes[f"left in layer {layer}"] = torch.empty(count, 0)
        scores = self.score(tokens)
        count = len(tokens.notes[f"left in layer {tokens.layer}"])
        keep = best(scores if self.by_head else scores.mean(0, keepdim=True), count)
        return Selection(keep if self.by_head else keep[0])

    def _supports(self, shape: ModelShape) -> Sequence[AttentionSupport]:
        return [AttentionSupport(layer, threshold=self.threshold) for layer in range(shape.text_layers)]
