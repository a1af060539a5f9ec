"""H2O: heavy hitters, the tokens that have received most attention so far, stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlprune import options
from vlprune.image import CacheTokens
from vlprune.method import register
from vlprune.methods.kv.policy import RunningPolicy, latest


@register("h2o")
@dataclass(kw_only=True)
class H2O(RunningPolicy):
    """Heavy-Hitter Oracle: each head's cache keeps the visual tokens with the largest sum of attention from all tokens.

    ``recent``: share of the budget that an image's last tokens have without a vote. 0 by default: the local context that the
    paper's recent window is for is text here, and text stays.

    ``again``: None, or evict as many entries again each time so many tokens have been generated; sums go on.

    Deviations from the official code: only visual tokens are evicted; sums are float32, of one sample (there of the batch),
    and averaged over the query heads that share a head of keys; the paper evicts after each token, which is ``again=1``.
    """

    paper: ClassVar[str] = "Zhang et al., H2O: Heavy-Hitter Oracle, NeurIPS 2023, arXiv:2306.14048"

    recent: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("recent", self.recent)

    def first(self, tokens: CacheTokens, scores: Tensor) -> Tensor | None:
        return latest(round(self.recent * tokens.count), tokens) if self.recent else None
