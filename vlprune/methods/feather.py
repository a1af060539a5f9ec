"""FEATHER: attention without rotary embedding chooses, and an even grid of the image stays beside it at first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.image import ImageLayout, LayerTokens, ModelShape, remembered, top
from vlprune.knobs import Draw
from vlprune.method import Selection, register
from vlprune.methods.salience import normalised
from vlprune.methods.staged import StagedMethod, best
from vlprune.signals import QueryAttention

LAST = QueryAttention(queries="last", rotary=False)


@register("feather")
@dataclass(kw_only=True)
class FEATHER(StagedMethod):
    """FEATHER: before a first LLM layer an even grid of patches stays and what the prompt's last token attends to, before a
    second one the latter alone, by attention without rotary embedding.

    Rotary embedding favours what is near the question, which is the bottom of an image; so queries and keys are taken before
    it, from the layer just run. The softmax runs over the image's tokens; the score is its mean over heads. The grid is every
    ``stride``-th row and column of the image: of its thumbnail, and of its crops where they are stitched together. Where the
    budget does not hold the grid, those of it that score best stay.

    ``stride``: rows and columns from one token of the grid to the next.
    ``layers``, ``keep``: see :class:`~vlprune.methods.staged.StagedMethod`; published are 8 and 16 of 32, with 37 % and 3.3 %
    of the tokens: a share r = 0.3 and the grid, then r squared of what is left. The grid is in the first stage only.

    Deviations from the official code: the counts are exact, the grid is a part of them and does not come on top.
    """

    paper: ClassVar[str] = "Endo et al., Feather the Throttle, ICCV 2025, arXiv:2412.13180"
    needs = (LAST,)
    published = {8: 0.367, 16: 0.033}

    stride: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise OptionError(f"stride={self.stride!r}: allowed is a number of rows and columns from 1 on")

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return super().knobs(draw, shape) | {"stride": draw.whole("stride", 1, 5)}

    def prefill(self, tokens: LayerTokens) -> Selection:
        scores = normalised(tokens[LAST][:, 0]).mean(0)  # over heads
        if tokens.layer > self.starts(tokens.shape.text_layers)[0]:
            return best(tokens, scores)
        order = top(scores, scores.shape[0])
        spread = grid(tokens.layout, self.stride).to(scores.device, non_blocking=True)[tokens.positions[order]]
        return Selection(order[top(spread.float(), tokens.count)].sort().values)


@remembered
def grid(layout: ImageLayout, stride: int) -> Tensor:
    """Which of the image's placeholders ``(total,)`` bool are on an even grid of its regions."""
    places = torch.cat([region[::stride, ::stride].flatten() for region in layout.regions])
    flags = torch.zeros(layout.total, dtype=torch.bool)
    flags[places[places >= 0]] = True
    return flags
