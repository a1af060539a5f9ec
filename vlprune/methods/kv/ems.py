"""EMS: importance for the whole prompt or for its end, whichever is higher; then evict what is unlike, merge what is alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.errors import OptionError
from vlprune.image import CacheTokens, ModelShape
from vlprune.method import Merge, register
from vlprune.methods.kv.merging import average, nearest
from vlprune.methods.kv.policy import CachePolicy
from vlprune.signals import AttentionColumns, Signal


@register("ems")
@dataclass(kw_only=True)
class EMS(CachePolicy):
    """Evict-then-Merge: each head keeps the visual tokens of the highest global or local score, and merges like ones.

    Local is the attention of the prompt's last ``window`` text tokens, global that of all tokens, scaled so that both have the
    same sum over the image. Of the entries that leave, those whose key has a cosine of ``likeness`` or more with a kept one
    are averaged into it; the others are lost.

    ``window``: text tokens of the local score. ``likeness``: lowest cosine that merges; None: nothing is merged.

    Deviations from the paper, which has no code: how it brings the global score to the local scale, its window and its
    threshold could not be found, so these are choices made here; heads of a layer keep equally many entries, where the
    paper gives heads budgets of their own, since a cache is a rectangle; only visual tokens are evicted.
    """

    paper: ClassVar[str] = "Li et al., EMS: Adaptive Evict-then-Merge Strategy, arXiv:2412.08521"

    window: int = 32
    likeness: float | None = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        options.positive("window", self.window, "number of text tokens")
        if self.likeness is not None and not -1.0 <= self.likeness <= 1.0:
            raise OptionError(f"likeness={self.likeness!r}: allowed is a cosine from -1 to 1, or None")

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (*super().wants(shape), *(self._end(layer) for layer in range(shape.text_layers)))

    def score(self, tokens: CacheTokens) -> Tensor:
        whole, end = super().score(tokens), self.received(tokens, self._end(tokens.layer))
        scale = end.sum(-1, keepdim=True) / whole.sum(-1, keepdim=True).clamp(min=torch.finfo(whole.dtype).tiny)
        return torch.maximum(end, whole * scale)

    def merge(self, tokens: CacheTokens, scores: Tensor, keep: Tensor) -> Merge | None:
        if self.likeness is None:
            return None
        likeness, target, stays = nearest(tokens.keys, keep)
        return average(target.masked_fill(~stays & (likeness < self.likeness), -1))

    def _end(self, layer: int) -> AttentionColumns:
        return AttentionColumns(layer, queries=self.window)
