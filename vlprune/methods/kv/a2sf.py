"""A2SF: accumulated attention that forgets, so that old tokens have no head start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlprune import options
from vlprune.method import register
from vlprune.methods.kv.policy import CachePolicy
from vlprune.signals import AttentionColumns


@register("a2sf")
@dataclass(kw_only=True)
class A2SF(CachePolicy):
    """Accumulative attention score with a forgetting factor: attention of all tokens, of which older ones weigh less.

    A token's score is the sum of the attention that it received, over the query heads that share a head of keys; that of
    the prompt's last token weighs 1, of the one before ``forgetting``, and so on. With 1 it is H2O's score.

    Deviations from the official code: only visual tokens are evicted, so its recent window, which is text here, needs no
    option; the window shapes that its later versions search by reinforcement learning are not here.
    """

    paper: ClassVar[str] = "Jo and Shin, A2SF: Accumulative Attention Scoring with Forgetting Factor, arXiv:2407.20485"

    forgetting: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("forgetting", self.forgetting)

    def votes(self, layer: int) -> AttentionColumns:
        return AttentionColumns(layer, decay=self.forgetting)
