"""VTC-CLS: [CLS] attention of several blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vlprune.errors import OptionError
from vlprune.image import ImageTokens, ModelShape
from vlprune.knobs import Draw
from vlprune.method import Method, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import attention_of, attention_signal, best_of_tiles
from vlprune.signals import Signal


@register("vtc-cls")
@dataclass(kw_only=True)
class VTCCLS(Method):
    """Keeps the patches with the most [CLS] attention, summed over the last blocks of the vision encoder.

    The blocks are those from ``layer`` to the one whose output goes to the projector, both included; attention is averaged
    over heads and not normalised between blocks. Of several tiles each keeps an equal share of the budget.

    ``layer``: the first block, counted from 0, in (0, 1) as a fraction of the encoder's depth. The official default, 16 of
    CLIP's 24, is 2/3. A block behind the features' stands for that one.

    Deviations from the official code, which knows one tile only: kept tokens keep their positions, each sample of a batch has
    its own choice, scores are float32. Encoders without [CLS]: the attention of a tile's mean query.
    """

    paper: ClassVar[str] = "Wang et al., [CLS] Token Tells Everything Needed (VTC-CLS), 2024, arXiv:2412.05819"

    budget: int | float = 0.2
    layer: int | float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.layer, int) and not isinstance(self.layer, bool) and self.layer >= 0
        if not whole and not (isinstance(self.layer, float) and 0 < self.layer < 1):
            raise OptionError(f"layer={self.layer!r}: allowed is a block >= 0 (int) or a fraction of the depth in (0, 1)")

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"layer": draw.whole("layer", 0, shape.feature_layer)}

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        first = self.layer if isinstance(self.layer, int) else round(self.layer * shape.vision_layers)
        last = shape.feature_layer
        return tuple(attention_signal(shape, layer) for layer in range(min(first, last), last + 1))

    def select(self, image: ImageTokens) -> Selection:
        return Selection(with_separators(best_of_tiles(attention_of(image), image), image))
