"""TransPrune: tokens stay that the LLM's modules change much, and that the question looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlprune.image import LayerTokens, ModelShape
from vlprune.method import Selection, register
from vlprune.methods.staged import TEXT, StagedMethod, attention_of_text, best
from vlprune.signals import Signal, Transition

MODULES = ("attention", "mlp")


@register("transprune")
@dataclass(kw_only=True)
class TransPrune(StagedMethod):
    """TransPrune: visual tokens leave at several LLM layers that attention and feed-forward networks hardly change, and that
    the text does not look at.

    What a module does to a token is the ratio of lengths of what comes out to what goes in, times ``exp(1 - cos)`` of the
    two as a share of that of all tokens of the sequence. Attention and feed-forward network are added up, over the layers from
    the one before the first stage on. The attention is that of text behind the image in the layer before, averaged
    over it and over heads. Both are divided by their sum over the image's tokens, then added up.

    ``layers``, ``keep``: see :class:`~vlprune.methods.staged.StagedMethod`; 7, 9 and 12 of 32, with 0.875, 0.625 and 0.125.

    Deviations from the official code: the attention is that of the layer just run, not of the layer to come, projected ahead
    of time; kept tokens keep their positions; shares are of a sample's own tokens, there of the whole batch. Without text
    behind an image, the transitions alone decide.
    """

    paper: ClassVar[str] = "Li et al., TransPrune, 2025, arXiv:2507.20630"
    published = {7: 0.875, 9: 0.625, 12: 0.125}

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        starts = self.starts(shape.text_layers)
        return (TEXT, *(Transition(i, module=m) for i in range(starts[0] - 1, starts[-1]) for m in MODULES))

    def score(self, tokens: LayerTokens) -> Tensor:
        change, wanted = self._changes(tokens)[tokens.positions], attention_of_text(tokens)
        return change / (change.sum() + 1e-8) + wanted / (wanted.sum() + 1e-8)

    def prefill(self, tokens: LayerTokens) -> Selection:
        return best(tokens, self.score(tokens))

    def _changes(self, tokens: LayerTokens) -> Tensor:
        """How much the modules have changed the image's tokens so far ``(total,)``.

        Kept from stage to stage, since shares are those of the tokens that were there.
        """
        starts = self.starts(tokens.shape.text_layers)
        asked = [start for start in starts if _note(start) in tokens.notes]
        since = asked[-1] if asked else starts[0] - 1
        total = tokens.notes[_note(since)] if asked else torch.zeros(tokens.layout.total, device=tokens.visual.device)
        for signal in (Transition(i, module=m) for i in range(since, tokens.layer) for m in MODULES):
            length, cosine = tokens.rows(signal).unbind(-1)
            change = length * (1 - cosine).softmax(0)
            total = total.index_add(0, tokens.positions, change[tokens.visual])
        tokens.notes[_note(tokens.layer)] = total
        return total


def _note(layer: int) -> str:
    return f"transprune_{layer}"
