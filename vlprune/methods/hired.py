"""HiRED: [CLS] attention divides a budget among tiles and picks the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlprune import options
from vlprune.image import ImageLayout, ImageTokens, ModelShape, top
from vlprune.knobs import Draw
from vlprune.method import Method, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import ranks
from vlprune.signals import ClsAttention, MeanAttention, Signal

EARLY, LATE = ClsAttention(layer=0), ClsAttention(layer=-2)


@register("hired")
@dataclass(kw_only=True)
class HiRED(Method):
    """High-Resolution Early Dropping: [CLS] attention divides a fixed budget among tiles and picks the tokens of each.

    Of ``T`` tokens the thumbnail gets ``min(int(alpha T), its patches)``, the crops share the rest in proportion to how
    much attention [CLS] pays, in an early layer of the thumbnail, to the part that they show. Each tile keeps the tokens
    with the most [CLS] attention in the late layer that feeds the projector. Attention is summed over heads. An image of
    one tile (LLaVA-1.5) keeps its ``T`` best tokens. Where there are several and none is the thumbnail, as in a video, each
    has an equal share: nothing tells which one matters.

    ``alpha``: the thumbnail's share of the budget, in [0, 1].
    ``allocation``: ``"counts"`` is the official code's rule and what the published numbers came from: a crop is worth how
    many of the thumbnail's ``int((1 - alpha) N)`` most attended patches lie in its share of the raster order (bands of
    rows, also for 2 x 2 crops). ``"sums"`` is the paper's: the attention within the region that the crop shows.

    Deviations from the official code: the budget is met exactly (it loses what rounding leaves over and what lies in the
    padding), kept tokens keep their positions, images of one tile are pruned under LLaVA-NeXT too, each sample of a batch
    has its own choice, scores are float32. Encoders without [CLS]: the attention of a tile's mean query, in the first block
    and in the one whose output goes to the projector. Row ends are dropped, as there, unless the budget exceeds the patches.
    """

    paper: ClassVar[str] = "Arif et al., HiRED, AAAI 2025, arXiv:2408.10945"

    budget: int | float = 0.2
    alpha: float = 0.5
    allocation: Literal["counts", "sums"] = "counts"

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("alpha", self.alpha, of="the budget")
        options.one_of("allocation", self.allocation, ("counts", "sums"))

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"alpha": draw.number("alpha", 0.0, 1.0), "allocation": draw.choice("allocation", ("counts", "sums"))}

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (EARLY, LATE) if shape.has_cls else (MeanAttention(0), MeanAttention(shape.feature_layer))

    def select(self, image: ImageTokens) -> Selection:
        layout = image.layout
        places = image.host(layout.placeholder)
        early, late = _attention(image)
        place = ranks(late.sum(1).masked_fill(places < 0, -torch.inf))
        count = min(image.count, sum(layout.available))
        # The seat of rank r in a tile of quota q is worth q - (r + 1): the best seats are each tile's whole part, then the
        # largest remainders. Only crops compete for those, and no seat lies in the padding.
        quotas = self._quotas(early, image, count)
        worth = quotas[:, None] - (place + 1)
        if layout.thumbnail:
            worth[0].masked_fill_(place[0] >= quotas[0], -1e9)
        keep = places.flatten()[top(worth.masked_fill(places < 0, -torch.inf).flatten(), count)]
        return Selection(with_separators(keep, image))

    def _quotas(self, early: Tensor, image: ImageTokens, count: int) -> Tensor:
        """Each tile's part ``(tiles,)`` of ``count``, before rounding."""
        layout = image.layout
        if layout.tiles == 1 or not layout.thumbnail:
            return torch.full((layout.tiles,), count / layout.tiles, device=image.device)
        thumbnail = min(int(count * self.alpha), layout.available[0])
        thumbnail = max(thumbnail, count - sum(layout.available[1:]))
        shares = self._shares(early[0].sum(0), layout)
        return torch.cat([shares.new_tensor([thumbnail]), shares * (count - thumbnail)])

    def _shares(self, attention: Tensor, layout: ImageLayout) -> Tensor:
        """Each crop's share ``(crops,)`` of their common budget, from the thumbnail's early [CLS] attention ``(N,)``."""
        rows, columns = layout.grid
        crops = layout.tiles - 1
        patch = torch.arange(rows * columns, device=attention.device)
        if self.allocation == "counts":
            weights = torch.zeros_like(attention)
            weights[top(attention, int(attention.shape[0] * (1 - self.alpha)))] = 1.0
            crop = patch * crops // attention.shape[0]
        else:
            weights = attention
            down, right = layout.crops
            crop = patch // columns * down // rows * right + patch % columns * right // columns
        sums = torch.zeros(crops, device=attention.device).index_add(0, crop, weights)
        total = sums.sum()
        return torch.where(total > 0, sums / total.clamp(min=1e-30), 1.0 / crops)


def _attention(image: ImageTokens) -> tuple[Tensor, Tensor]:
    """Attention of the early and of the late layer: ``(tiles, heads, patches)``."""
    if LATE in image.signals:
        return image[EARLY], image[LATE]
    layers = {signal.layer or 0: values for signal, values in image.signals.items() if isinstance(signal, MeanAttention)}
    return layers[0], layers[max(layers)]
