"""What a method may ask to be measured. A signal that no method asks for costs nothing.

Signals are measured beside the model's own attention: whichever kernel the model runs, it goes on running it. All are
float32 and without gradient; queries and keys are those that the kernel gets, with rotary embedding and norms applied.

``layer`` counts blocks from 0; negative numbers count from the end, so vision layer -2 is the block whose output LLaVA feeds
to its projector. None is the hook's own block: the one just run for ``encode``, the one before the layer for ``prefill``.

The shapes below are those of the vision encoder, with a tile's patches in raster order; where the model merges groups of
patches into one visual token, *patch* means such a group, and its value is the mean over the group. In the LLM there is one
image, so the dimension ``tiles`` is missing, and *patches* are the image's visual tokens that are still alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Signal:
    """A statistic of block ``layer`` of ``tower``, the vision encoder or the LLM (``"text"``)."""

    layer: int | None = None
    tower: Literal["vision", "text"] = "vision"


@dataclass(frozen=True)
class ClsAttention(Signal):
    """Softmax attention that [CLS] pays to each patch: ``(tiles, heads, patches)``. Vision encoder only.

    The softmax runs over all keys, [CLS] included, so a row adds up to less than 1.
    """


@dataclass(frozen=True)
class MeanAttention(Signal):
    """Softmax attention that a tile's mean query pays to its patches: ``(tiles, heads, patches)``. Vision encoder only.

    It stands in for the attention of [CLS] where there is none.
    """


@dataclass(frozen=True)
class ReceivedAttention(Signal):
    """Attention that each patch receives, averaged over all queries: ``(tiles, heads, patches)``."""


@dataclass(frozen=True)
class GlobalAttention(Signal):
    """Attention that each patch receives from global ones, averaged over these: ``(tiles, heads, patches)``. Vision encoder
    only.

    Rows of the encoder are global that receive, averaged over heads, more than ``threshold`` times what a row receives on
    average; where there is none, all are.
    """

    threshold: float = 1.0


@dataclass(frozen=True)
class QueryAttention(Signal):
    """Softmax attention of text tokens to an image's visual tokens: ``(heads, queries, patches)``. LLM only.

    ``queries``: ``"last"``, the last token of the prompt; ``"text"``, all its text tokens; or a number, so many of its last
    text tokens. Text before the image pays it no attention, so its rows are zero. ``mean_heads`` and ``mean_queries`` average
    over heads and queries, which leaves one of them.

    Without ``rotary``, queries and keys are those before rotary embedding, of this pass alone, and every token of it is in
    sight of those behind it, windows or not. They are projected a second time for that.
    """

    tower: Literal["vision", "text"] = "text"
    queries: Literal["last", "text"] | int = "last"
    mean_heads: bool = False
    mean_queries: bool = False
    rotary: bool = True


@dataclass(frozen=True)
class AttentionColumns(Signal):
    """Softmax attention that each visual token receives, summed over queries by their weights: ``(heads, patches)``. LLM only.

    ``queries``: ``"all"``; ``"text"``; ``"after"``, the text behind the sequence's last visual token; ``"last"``, the last
    token of the prompt; or a number, so many of its last text tokens. The last of them weighs 1, the one before ``decay``, and
    so on. ``temperature``: divides the scores. ``noise``: seed of Gumbel noise on the scores, one number a key and a head of
    keys, the same for all queries; None for none.
    """

    tower: Literal["vision", "text"] = "text"
    queries: Literal["all", "text", "after", "last"] | int = "all"
    decay: float = 1.0
    temperature: float = 1.0
    noise: int | None = None


@dataclass(frozen=True)
class AttentionSupport(Signal):
    """How many keys a query looks at: those of at least ``threshold`` times its largest attention. ``(heads,)``. LLM only.

    A mean over the text behind the sequence's last visual token; 0 where there is none. It belongs to the layer, not to a
    token, so that a method that waits for all layers (``Method.waits``) sees those of all of them.
    """

    tower: Literal["vision", "text"] = "text"
    threshold: float = 0.01


@dataclass(frozen=True)
class SinkShare(Signal):
    """Share of a token's squared norm that lies in one of the sink channels, the largest of them: ``(patches, 1)``. LLM only.

    Of the hidden states that enter the block. Sink channels are the ``channels`` in which the first token of the sequence
    is largest: attention sinks are massive in the channels in which that one is. If hidden states of ``hidden`` channels are
    divided by the root of their mean square, a value of t is a share of t² / hidden.
    """

    tower: Literal["vision", "text"] = "text"
    channels: int = 2


@dataclass(frozen=True)
class Keys(Signal):
    """Attention keys: ``(tiles, heads, patches, head_dim)``."""


@dataclass(frozen=True)
class Values(Signal):
    """Attention values: ``(tiles, heads, patches, head_dim)``."""


@dataclass(frozen=True)
class ClsValues(Signal):
    """Attention value of [CLS]: ``(tiles, heads, head_dim)``. Vision encoder only."""


@dataclass(frozen=True)
class Hidden(Signal):
    """Hidden states after the block: ``(tiles, patches, hidden)``.

    ``state``, LLM only: ``"before"`` the block, so that those of layer 0 are the embeddings, or ``"normed"``, after the block
    and by the LLM's final norm.
    """

    state: Literal["after", "before", "normed"] = "after"


@dataclass(frozen=True)
class ModuleDelta(Signal):
    """What went into a block's attention or feed-forward network, normalised, and what came out, before it was added to the
    residual stream: ``(2, tiles, patches, hidden)``."""

    module: Literal["attention", "mlp"] = "attention"


@dataclass(frozen=True)
class Transition(Signal):
    """What a block's attention or feed-forward network did to each token: ``(patches, 2)``. LLM only.

    First how much longer what came out of it was than what went in, normalised; then the cosine between the two.
    """

    tower: Literal["vision", "text"] = "text"
    module: Literal["attention", "mlp"] = "attention"
