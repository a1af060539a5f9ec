"""VisPruner: the patches that [CLS] attends to, and of the others those that are no duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.image import ImageTokens, ModelShape, top
from vlprune.kernels import bipartite_match
from vlprune.knobs import Draw
from vlprune.method import Method, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import KINDS, attention_of, attention_signal, in_picture, rows_of, tiles_alike
from vlprune.signals import Hidden, ReceivedAttention, Signal

AT_ONCE = 8
"""Duplicates that leave in one round."""


@register("vispruner")
@dataclass(kw_only=True)
class VisPruner(Method):
    """VisPruner: a part of the budget goes to the most attended patches, the rest to the least redundant of the others.

    A tile that keeps ``T`` patches takes the first ``int(T important)`` by [CLS] attention (mean over heads) in the block
    whose output goes to the projector. The others, in the same order, lose up to eight in every round: those at even places of
    the list whose features have the highest cosine to one at an odd place. What is left of the even ones goes before the odd
    ones, by falling cosine. Features are those in front of the projector. Of several tiles each keeps an equal share.

    ``important``: the share of the most attended ones, in [0, 1]; the paper uses 0.5, and 0.75 for 64 of 576 tokens.

    Deviations from the official code: the budget is one for the image, not for a tile; kept tokens keep their positions; lists
    of odd length have one more at even places (there: an error), and no round drops more than lie there; tiles are those of
    the model, and their padding is never chosen; scores are float32. Row ends are dropped, as there, unless the budget
    exceeds the patches. Encoders without [CLS]: the attention that a patch receives, which the authors advise.
    """

    paper: ClassVar[str] = "Zhang et al., Beyond Text-Visual Attention (VisPruner), ICCV 2025, arXiv:2412.01818v3"

    budget: int | float = 0.2
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("important", self.important, of="the budget")

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        last = shape.feature_layer
        return attention_signal(shape, last, ReceivedAttention), Hidden(last)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"important": draw.number("important", 0.0, 1.0)}

    def select(self, image: ImageTokens) -> Selection:
        hidden = next(values for signal, values in image.signals.items() if not isinstance(signal, KINDS))
        scores = in_picture(attention_of(image), image)
        order = top(scores, scores.shape[1])
        places = image.host(image.layout.placeholder)
        kept = []
        for count, available, tiles in tiles_alike(image.layout, image.count):
            which = image.host(tiles)
            patches = self._of_tiles(order[which][:, :available], hidden[which], count)
            kept.append(places[which].gather(1, patches).flatten())
        return Selection(with_separators(torch.cat(kept), image))

    def _of_tiles(self, order: Tensor, hidden: Tensor, count: int) -> Tensor:
        """``(tiles, count)`` patches out of ``order (tiles, n)``, best first; ``hidden (tiles, patches, D)``."""
        first = int(count * self.important)
        important, others = order[:, :first], order[:, first:]
        while (spare := others.shape[1] - (count - first)) > 0:
            others = _fewer(others, hidden, spare)
        return torch.cat([important, others], 1)


def _fewer(patches: Tensor, hidden: Tensor, spare: int) -> Tensor:
    """One round: ``patches (tiles, n)`` without up to ``spare`` of those that are most alike to another."""
    even, odd = patches[:, ::2], patches[:, 1::2]
    likeness, _ = bipartite_match(rows_of(hidden, even), rows_of(hidden, odd))
    falling = even.gather(1, top(likeness, even.shape[1]))
    return torch.cat([falling[:, min(AT_ONCE, spare, even.shape[1]) :], odd], 1)
