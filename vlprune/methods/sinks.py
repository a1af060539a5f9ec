"""Attention sinks left out of account: an option of every method that goes by the attention of the LLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vlprune.errors import OptionError
from vlprune.image import CacheTokens, LayerTokens, ModelShape
from vlprune.method import Method, Selection
from vlprune.methods.chain import Chain
from vlprune.signals import AttentionColumns, QueryAttention, ReceivedAttention, Signal, SinkShare
from vlprune.sinks import sink_share

ATTENTION = (QueryAttention, ReceivedAttention, AttentionColumns)
PUBLISHED = 20**2 / 4096
"""The paper's threshold of 20, of normalised hidden states of 4096 channels, as a share of their squared norm."""


def without_sinks(method: Method, threshold: float = PUBLISHED, channels: int = 2) -> Method:
    """``method`` as it would choose if attention sinks among the visual tokens got no attention.

    >>> vlprune.apply(model, vlprune.without_sinks(vlprune.SnapKV(budget=0.2)))
    >>> vlprune.apply(model, "snapkv", budget=0.2, without_sinks=True)  # the same

    A sink gets much attention and holds little; it is told by its hidden state before the layer whose cache is evicted, or
    before which tokens leave (VAR's detector: Kang et al., See What You Are Told, ICLR 2025, arXiv:2503.03321): a visual
    token in one of whose sink channels lies more than ``threshold`` of its squared norm. Sink channels are the ``channels`` in
    which the first token of the prompt is largest; the paper lists them for Llama 2, where they are those of that token, too.
    Sinks stay only where the budget has room for tokens without attention.

    Raises :class:`OptionError` for a method that chooses nothing inside the LLM.
    """
    return WithoutSinks(methods=(method,), threshold=threshold, channels=channels)


@dataclass(kw_only=True)
class WithoutSinks(Chain):
    """See :func:`without_sinks`. A chain of one, which sees attention without sinks."""

    name = "without-sinks"
    threshold: float = PUBLISHED
    channels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {"prefill", "evict"} & set(self.stages):
            raise OptionError(f"{self.methods[0].name} chooses before the LLM, whose attention sinks it does not see")
        if not 0.0 <= self.threshold <= 1.0 or self.channels < 1:
            raise OptionError(
                f"threshold={self.threshold!r}, channels={self.channels!r}: allowed are a share from 0 to 1, and at least 1"
            )

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        evicts = "evict" in self.stages
        return (*super().wants(shape), *(self._share(layer) for layer in range(shape.text_layers) if evicts))

    def prefill(self, tokens: LayerTokens) -> Selection:
        shares = sink_share(tokens.hidden[None].float(), None, self.channels)[0, tokens.visual, 0]
        return super().prefill(replace(tokens, signals=_unlit(tokens.signals, (shares > self.threshold)[None])))

    def evict(self, tokens: CacheTokens) -> Selection:
        measured = tokens.signals.get(self._share(tokens.layer))
        if measured is not None:
            tokens.carry["sink"] = (measured[:, 0] > self.threshold)[None]
        return super().evict(replace(tokens, signals=_unlit(tokens.signals, tokens.carry["sink"])))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "threshold": self.threshold, "channels": self.channels}

    def _share(self, layer: int) -> SinkShare:
        return SinkShare(layer, channels=self.channels)


def _unlit(signals: dict[Signal, Tensor], sinks: Tensor) -> dict[Signal, Tensor]:
    """``signals`` with no attention for ``sinks (1 or kv_heads, N)``."""

    def without(value: Tensor) -> Tensor:
        mask = sinks if len(sinks) == 1 else sinks.repeat_interleave(max(value.shape[0] // len(sinks), 1), 0)
        return value.masked_fill(mask.view(len(mask), *[1] * (value.ndim - 2), -1), 0.0)

    return {s: without(v) if isinstance(s, ATTENTION) else v for s, v in signals.items()}
