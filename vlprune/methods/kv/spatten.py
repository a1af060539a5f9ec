"""SpAtten: importance adds up from layer to layer, and a token that is pruned in one layer does not come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlprune.image import LayerTokens
from vlprune.method import Selection, register
from vlprune.methods.staged import StagedMethod, best
from vlprune.signals import AttentionColumns

RECEIVED = AttentionColumns()


@register("spatten")
@dataclass(kw_only=True)
class SpAtten(StagedMethod):
    """SpAtten's cascade: before each layer of the LLM the visual tokens leave that have received least attention so far.

    A token's importance is the attention that it received from all tokens in all heads, summed over the layers gone through.
    So a token that leaves saves all further layers, and its place in their caches.

    ``layers``, ``keep``: see :class:`~vlprune.methods.staged.StagedMethod`; the layers are all but the first, with counts that
    fall by one factor from each to the next. Importance is summed over the layers before which tokens leave.

    Deviations from the paper: only visual tokens leave; its ratios of the layers could not be found, so the even factor is a
    choice made here. Heads are not pruned, and values and bits not skipped, which is what its circuits are for: in a model
    of matrix products they would save nothing.
    """

    paper: ClassVar[str] = "Wang et al., SpAtten, HPCA 2021, arXiv:2012.09852"
    needs = (RECEIVED,)
    published = {layer: 2 ** (-layer / 16) for layer in range(1, 32)}

    def prefill(self, tokens: LayerTokens) -> Selection:
        received = tokens[RECEIVED].mean(0)
        if "importance" not in tokens.notes:
            tokens.notes["importance"] = received.new_zeros(tokens.layout.total)
        importance = tokens.notes["importance"].index_add(0, tokens.positions, received)
        tokens.notes["importance"] = importance
        return best(tokens, importance[tokens.positions])
