"""GlobalCom²: the thumbnail tells how much each crop keeps, and what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.image import ImageLayout, ImageTokens, ModelShape, remembered, top
from vlprune.knobs import Draw
from vlprune.method import Method, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import KINDS, attention_signal, best_of_tiles, in_picture, number_or_lowest, ranks
from vlprune.signals import Signal


@register("globalcom2")
@dataclass(kw_only=True)
class GlobalCom2(Method):
    """GlobalCom²: [CLS] of the thumbnail divides the budget among crops and has a say in what they keep.

    With ``c`` the logarithm of the attention of [CLS] in the last vision block, averaged over heads, of the thumbnail and of
    each crop, and R the budget as a fraction of all patches:

    1. The thumbnail keeps its part R, those with the highest ``c``.
    2. Crop i keeps the part ``R_i = min(1, R (1 + s_i - mean(s)))`` of its ``n_i`` patches, where ``s`` is the softmax over
       crops of the sum of the thumbnail's ``c`` over the cell that the crop shows, divided by ``temperature``.
    3. A crop's patch scores ``c / |c| + g / |g|``, norms over the crop's patches. ``g`` is the thumbnail's ``c``, stretched
       bilinearly to the picture without its padding.

    Images without crops keep their best patches by ``c``, tiles without a thumbnail an equal share each.

    Deviations from the official code: it has the logits of [CLS] for ``c``, which differ by a constant for each tile, so the
    thumbnail's order and, of equal cells, ``s`` are the same, and the two terms of step 3 weigh slightly differently. Parts
    are scaled to meet the budget exactly. Row ends, which come on top of it there, are dropped unless the budget exceeds the
    patches. Patches of crops with padding stay where they are, tokens keep order and positions, and each image has its own
    thumbnail. Encoders without [CLS]: the attention of a tile's mean query.
    """

    paper: ClassVar[str] = "Liu et al., Global Compression Commander, 2025, arXiv:2501.05179"

    budget: int | float = 0.25
    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        options.above_zero("temperature", self.temperature)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"temperature": draw.number("temperature", 0.5, 40.0)}

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (attention_signal(shape, shape.vision_layers - 1),)

    def select(self, image: ImageTokens) -> Selection:
        attention = next(values for signal, values in image.signals.items() if isinstance(signal, KINDS))
        local = number_or_lowest(attention.clamp(min=1e-30).log().mean(1))
        if not _has_crops(image.layout):
            return Selection(with_separators(best_of_tiles(local, image), image))
        count = min(image.count, sum(image.layout.available))
        scores = torch.cat([local[:1], _guided(local, image)])
        place = ranks(in_picture(scores, image))
        worth = self._quotas(local[0], image.layout, count)[:, None] - (place + 1)
        keep = top(in_picture(worth, image).flatten(), count)
        return Selection(with_separators(image.host(image.layout.placeholder).flatten()[keep], image))

    def _quotas(self, thumbnail: Tensor, layout: ImageLayout, count: int) -> Tensor:
        """Each tile's part of ``count (tiles,)``, before rounding; whole for the thumbnail."""
        available = layout.available
        whole = max(count * available[0] // sum(available), count - sum(available[1:]))
        cell, crops = _cells(layout).to(thumbnail.device, non_blocking=True), layout.tiles - 1
        sums = torch.zeros(crops, device=thumbnail.device).index_add(0, cell, thumbnail)
        share = (sums / self.temperature).softmax(0)
        ratio = (count / sum(available) * (1 + share - 1 / crops)).clamp(max=1)
        sizes = torch.tensor(available[1:], dtype=ratio.dtype).to(ratio.device, non_blocking=True)
        parts = ratio * sizes
        parts = parts / parts.sum() * (count - whole)
        # Rounded, so that crops that differ by rounding errors only are equal.
        return torch.cat([parts.new_full((1,), whole), parts.mul(1e3).round() / 1e3])


def _has_crops(layout: ImageLayout) -> bool:
    """Whether there are a thumbnail and crops that are stitched together."""
    return layout.thumbnail and layout.tiles > 1 and len(layout.regions) == 2


def _guided(local: Tensor, image: ImageTokens) -> Tensor:
    """Scores ``(crops, N)`` of crops' patches: their own and the thumbnail's, both of unit length. ``local (tiles, N)``."""
    layout = image.layout
    picture = layout.regions[1]
    stretched = torch.nn.functional.interpolate(local[0].view(1, 1, *layout.grid), tuple(picture.shape), mode="bilinear")
    everywhere = local.new_zeros(layout.total).scatter(0, image.host(picture.flatten()), stretched.flatten())
    places = image.host(layout.placeholder[1:])
    seen = places >= 0
    terms = (local[1:] * seen, everywhere[places.clamp(min=0)] * seen)
    own, others = (term / term.norm(dim=1, keepdim=True).clamp(min=1e-12) for term in terms)
    # Rounded, so that patches that differ by rounding errors only are equal.
    return (own + others).mul(1e6).round()


@remembered
def _cells(layout: ImageLayout) -> Tensor:
    """Which crop shows a patch of the thumbnail ``(N,)``; the last crops take what the division leaves over."""
    (rows, columns), (down, right) = layout.grid, layout.crops
    row = (torch.arange(rows) // max(1, rows // down)).clamp(max=down - 1)
    column = (torch.arange(columns) // max(1, columns // right)).clamp(max=right - 1)
    return (row[:, None] * right + column).flatten()
