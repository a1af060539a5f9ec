"""PyramidDrop: step by step the LLM drops the visual tokens that the end of the question does not look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlprune.image import LayerTokens
from vlprune.method import Selection, register
from vlprune.methods.staged import LAST, StagedMethod, best


@register("pyramiddrop")
@dataclass(kw_only=True)
class PyramidDrop(StagedMethod):
    """PyramidDrop: visual tokens leave at several depths of the LLM, more and more of them, by the last token's attention.

    Before each of ``layers`` an image keeps its tokens with the most attention from the last token of the prompt in the layer
    before, averaged over heads. Counts fall by one factor from stage to stage: with a factor of a half, and the published
    layers 8, 16 and 24 of 32, to a half, a quarter and an eighth, a mean of 0.46875 of the tokens.

    ``layers``, ``keep``: see :class:`~vlprune.methods.staged.StagedMethod`; the layers are 8, 16 and 24 of 32.

    Deviations from the official code: it projects queries and keys of the layer to come again to look ahead, here it is the
    attention of the layer just run, as in FastV; kept tokens keep their positions, there they are counted anew; every image
    of a prompt has its own share; scores are float32.
    """

    paper: ClassVar[str] = "Xing et al., PyramidDrop, CVPR 2025, arXiv:2410.17247"
    needs = (LAST,)
    published = {8: 0.5, 16: 0.25, 24: 0.125}

    budget: int | float = 0.46875

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens[LAST][0, 0]

    def prefill(self, tokens: LayerTokens) -> Selection:
        return best(tokens, self.score(tokens))
