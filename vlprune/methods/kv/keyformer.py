"""Keyformer: attention with Gumbel noise on its scores, accumulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlprune import options
from vlprune.method import register
from vlprune.methods.kv.policy import RunningPolicy
from vlprune.signals import AttentionColumns


@register("keyformer")
@dataclass(kw_only=True)
class Keyformer(RunningPolicy):
    """Keyformer: the sum of softmax((scores + Gumbel noise) / temperature) that a token receives, head by head.

    The noise keeps a softmax over fewer tokens from being sure of itself; it is a number for each key and head, a function of
    ``seed``, the layer and the token's place, so a choice can be repeated, in a batch or alone.

    ``temperature``: of the softmax. ``again``: None, or evict as many entries again each time so many tokens have been
    generated.

    Deviations from the official code: only visual tokens are evicted, so its recent window, which is text here, needs no
    option; its temperature grows from 1 to 2 while text is generated, here it stays.
    """

    paper: ClassVar[str] = "Adnan et al., Keyformer, MLSys 2024, arXiv:2403.09054"

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        options.above_zero("temperature", self.temperature)

    def votes(self, layer: int) -> AttentionColumns:
        return AttentionColumns(layer, temperature=self.temperature, noise=self.seed)
