"""What methods that evict visual tokens from the KV cache have in common: a score, and parts to make one of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune import options
from vlprune.errors import OptionError
from vlprune.image import CacheTokens, ImageLayout, ModelShape, top
from vlprune.method import Merge, Method, Mixture, Plan, Selection
from vlprune.signals import AttentionColumns, Signal


@dataclass(kw_only=True)
class CachePolicy(Method):
    """Keeps, in each layer's cache and for each head of keys and values, the visual tokens with the highest score.

    The score of a token is the attention that it received from some queries, each with a weight (``votes``), times a
    modifier, smoothed over neighbours, averaged over the query heads that share a head of keys and values. Subclasses say
    which queries and weights, and may replace any other part. Text is never evicted: where papers force the first or
    the latest tokens to stay, those are text here.

    ``kernel``: odd width of the average pooling of attention over neighbours in the image's run; 1 for none.
    """

    one_set: ClassVar[bool] = False
    """Whether all heads of a layer keep the same tokens, by the mean of their scores."""

    budget: int | float = 0.2
    kernel: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"kernel={self.kernel!r}: allowed is an odd number from 1 on")

    def votes(self, layer: int) -> AttentionColumns:
        """Which queries count, and how much."""
        return AttentionColumns(layer)

    def counts(self, total: int, layers: int) -> Sequence[int]:
        """Entries left in each layer's cache."""
        return [self.count(total)] * layers

    def score(self, tokens: CacheTokens) -> Tensor:
        """Scores ``(kv_heads, N)``; higher is better."""
        return self.received(tokens, self.votes(tokens.layer))

    def received(self, tokens: CacheTokens, votes: AttentionColumns) -> Tensor:
        """The attention that ``votes`` names, smoothed, for each head of keys: ``(kv_heads, N)``."""
        return smoothed(by_head(tokens[votes], tokens), self.kernel)

    def first(self, tokens: CacheTokens, scores: Tensor) -> Tensor | None:
        """Entries ``(kv_heads or 1, N)`` bool that stay before any other, by their score if they are too many."""
        return None

    def merge(self, tokens: CacheTokens, scores: Tensor, keep: Tensor) -> Merge | Mixture | None:
        """What becomes of the others. ``keep (kv_heads or 1, T)``: ascending indices of those that stay."""
        return None

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return tuple(self.votes(layer) for layer in range(shape.text_layers))

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        counts = self.counts(layout.total, shape.text_layers)
        return Plan(layout.total, cached={layer: count for layer, count in enumerate(counts) if count < layout.total})

    def evict(self, tokens: CacheTokens) -> Selection:
        scores = self.score(tokens)
        if self.one_set:
            scores = scores.mean(0, keepdim=True)
        keep = best(scores, tokens.count, self.first(tokens, scores))
        merge = self.merge(tokens, scores, keep)
        return Selection(keep[0] if self.one_set else keep, merge)


@dataclass(kw_only=True)
class RunningPolicy(CachePolicy):
    """A policy that may go on evicting: each time ``again`` tokens have been generated, as many entries of each image leave.

    So the cache of a prompt with one image stops growing until a single entry is left. With None, the default, what the prompt
    leaves stays. Where scores accumulate, attention counts of the prompt's tokens and of each ``again``-th token after it.
    """

    accumulates: ClassVar[bool] = True

    again: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.again is not None:
            options.positive("again", self.again, "number of new tokens")

    @property
    def every(self) -> int | None:
        return self.again

    def left(self, count: int, new_tokens: int) -> int:
        return count if self.again is None else max(1, count - new_tokens // self.again * self.again)

    def score(self, tokens: CacheTokens) -> Tensor:
        scores = super().score(tokens)
        if self.again is not None and self.accumulates:
            if "received" in tokens.carry:
                scores = scores + tokens.carry["received"]
            tokens.carry["received"] = scores
        return scores


# ------------------------------------------------------------------ parts


def by_head(values: Tensor, tokens: CacheTokens) -> Tensor:
    """The mean over the query heads that share a head of keys: ``(kv_heads, N)``, of ``values (heads, N)``."""
    return values.view(tokens.keys.shape[0], -1, values.shape[-1]).mean(1)


def smoothed(scores: Tensor, width: int) -> Tensor:
    """The mean over ``width`` neighbours in the image's run; beyond its ends there are zeros."""
    return scores if width == 1 else F.avg_pool1d(scores[None], width, stride=1, padding=width // 2)[0]


def best(scores: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """Ascending indices ``(heads, count)`` of the highest ``scores (heads, N)``, those of ``first`` before all others.

    Ranked by two keys, so no constant is added to scores that would swallow their differences.
    """
    order = top(scores, scores.shape[-1])
    if first is not None:
        later = (~first).expand_as(scores).gather(-1, order).to(torch.uint8)
        order = order.gather(-1, later.sort(dim=-1, stable=True).indices)
    return order[..., :count].sort(dim=-1).values


def latest(count: int, tokens: CacheTokens) -> Tensor:
    """The ``count`` last entries of the image: ``(1, N)`` bool."""
    entries = tokens.keys.shape[1]
    return (torch.arange(entries, device=tokens.keys.device) >= entries - count)[None]
