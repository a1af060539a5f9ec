"""VATP: attention says how often a token is read, the norm of its value how much is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlprune import options
from vlprune.image import CacheTokens
from vlprune.method import register
from vlprune.methods.kv.policy import CachePolicy
from vlprune.signals import AttentionColumns


@register("vatp")
@dataclass(kw_only=True)
class VATP(CachePolicy):
    """Value-Aware Token Pruning: accumulated attention times the L1 norm of a token's value, head by head.

    ``window``: None, all tokens of the prompt vote, as in H2O; or so many of its last text tokens, as in Scissorhands.

    Deviations from the official code: only visual tokens are evicted. It forces the first 20 tokens of the sequence to stay,
    sinks whose values are short; those are text of the chat template, which stays anyway, and where a prompt begins with its
    image they compete. It simulates eviction by masks; here entries leave.
    """

    paper: ClassVar[str] = "Guo et al., Attention Score is not All You Need for Token Importance, EMNLP 2024, arXiv:2406.12335"

    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            options.positive("window", self.window, "number of text tokens")

    def votes(self, layer: int) -> AttentionColumns:
        return AttentionColumns(layer, queries=self.window or "all")

    def score(self, tokens: CacheTokens) -> Tensor:
        return super().score(tokens) * tokens.values.float().abs().sum(-1)
