"""DART: the LLM keeps a few pivots, and of the other visual tokens those that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlprune.budget import apportion
from vlprune.errors import OptionError
from vlprune.image import LayerTokens, ModelShape, top
from vlprune.knobs import Draw
from vlprune.method import Selection, register
from vlprune.methods.staged import StagedMethod
from vlprune.signals import Hidden, Keys

KEYS, STATES = Keys(tower="text"), Hidden(tower="text", state="normed")


@register("dart")
@dataclass(kw_only=True)
class DART(StagedMethod):
    """DART: before an early LLM layer each image keeps pivots, and the tokens that are least like one of them.

    Pivots are the ``image_pivots`` visual tokens, and the ``text_pivots`` text tokens behind the image, whose keys in the
    layer before are longest (L1 norm over all heads). One after the other, visual ones first and longer keys first, each pivot
    chooses from the visual tokens that are left those with the lowest cosine to it, of hidden states behind the LLM's final
    norm. All pivots choose equally many, earlier ones one more where that does not come out even. Visual pivots stay, too.

    ``layers``, ``keep``: see :class:`~vlprune.methods.staged.StagedMethod`; one layer, 2 of 32, unless told otherwise.

    Deviations from the official code: pivots choose in the order of their keys, there in that of a Python set; what does
    not come out even is not dropped from the budget; where fewer text tokens follow the image than there are to be pivots, the
    text before it steps in; a budget no larger than ``image_pivots`` keeps so many of them.
    """

    paper: ClassVar[str] = "Wen et al., DART, EMNLP 2025, arXiv:2502.11494"
    needs = (KEYS, STATES)
    published = {2: 0.222}

    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise OptionError(
                f"image_pivots={self.image_pivots!r}, text_pivots={self.text_pivots!r}: at least one visual pivot is needed"
            )

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        pivots = {"image_pivots": draw.whole("image_pivots", 1, 12), "text_pivots": draw.whole("text_pivots", 0, 8)}
        return super().knobs(draw, shape) | pivots

    def prefill(self, tokens: LayerTokens) -> Selection:
        lengths = tokens.rows(KEYS).abs().sum((0, 2))  # (n,): of all rows
        kept = top(lengths[tokens.visual], min(self.image_pivots, tokens.count))
        pivots = torch.cat([tokens.visual[kept], self._text_pivots(tokens, lengths)])
        states = normalize(tokens.rows(STATES), dim=-1).nan_to_num()
        unlike = -(states[pivots] @ states[tokens.visual].T)  # (pivots, N)
        rest = tokens.count - kept.shape[0]
        shares = apportion(rest, [1.0] * pivots.shape[0], [rest] * pivots.shape[0]) if rest else []
        for pivot, share in enumerate(shares):
            kept = torch.cat([kept, top(unlike[pivot].index_fill(0, kept, -torch.inf), share)])
        return Selection(kept.sort().values)

    def _text_pivots(self, tokens: LayerTokens, lengths: Tensor) -> Tensor:
        """Rows of the text tokens with the longest keys, those behind the image first."""
        ordered = tokens.text[top(lengths[tokens.text], tokens.text.shape[0])]
        behind = ordered > tokens.visual[-1]
        return ordered[top(behind.float(), self.text_pivots)]
