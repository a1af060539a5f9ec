"""FasterVLM: the patches that [CLS] attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlprune.image import ImageTokens, ModelShape
from vlprune.method import Method, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import attention_of, attention_signal, best_of_tiles
from vlprune.signals import Signal


@register("fastervlm")
@dataclass(kw_only=True)
class FasterVLM(Method):
    """Keeps the patches with the most [CLS] attention in the vision block whose output goes to the projector.

    Attention is averaged over heads. Of several tiles (thumbnail and crops, frames) each keeps an equal share of the budget.

    Deviations from the official code: the budget is one for the image, not for a tile; kept tokens keep their positions;
    tiles are those of the model, and their padding is never chosen (there: five tiles of an image that is stretched to
    672 x 672); scores are float32. Row ends are dropped, as there, unless the budget exceeds the patches. Encoders without
    [CLS]: the attention of a tile's mean query.
    """

    paper: ClassVar[str] = "Zhang et al., [CLS] Attention is All You Need (FasterVLM), 2024, arXiv:2412.01818"

    budget: int | float = 0.2

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (attention_signal(shape, shape.feature_layer),)

    def select(self, image: ImageTokens) -> Selection:
        return Selection(with_separators(best_of_tiles(attention_of(image), image), image))
