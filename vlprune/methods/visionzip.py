"""VisionZip: the patches that [CLS] attends to, and a few that stand for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune import options
from vlprune.image import ImageTokens, ModelShape, top
from vlprune.kernels import bipartite_match
from vlprune.knobs import Draw
from vlprune.method import Merge, Method, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import KINDS, attention_of, attention_signal, in_picture, rows_of, tiles_alike
from vlprune.signals import Keys, ReceivedAttention, Signal


@register("visionzip")
@dataclass(kw_only=True)
class VisionZip(Method):
    """VisionZip: dominant patches stay as they are, contextual ones take in those that leave.

    Of ``T`` tokens of a tile ``C = round(contextual T)`` are contextual. The other ``T - C`` are the patches with the most
    [CLS] attention, summed over heads, in the block whose output goes to the projector. Of the ``n`` patches that are left,
    in raster order, every ``max(1, n // C)``-th becomes a contextual token, C in all. Each of the others joins the contextual
    token whose key is most alike to its own (cosine of the mean over heads, same block), and a contextual token becomes the
    average of its own features and the mean of those that joined it. Of several tiles each keeps an equal share.

    ``contextual``: share of the budget, in [0, 1]. The published 64, 128 and 192 tokens have 10, 20 and 30 of them.

    Deviations from the official code: [CLS] itself does not enter the LLM, one more patch does; tokens are in raster order and
    keep their positions; projected features are merged, and the sum of the two halves, of twice the size, is halved, as
    the paper's text has it; the budget is one for the image, not for a tile; padding takes no part. Row ends are dropped, as
    there, unless the budget exceeds the patches. Encoders without [CLS]: the attention that a patch receives.
    """

    paper: ClassVar[str] = "Yang et al., VisionZip, CVPR 2025, arXiv:2412.04467"

    budget: int | float = 1 / 9
    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("contextual", self.contextual, of="the budget")

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        last = shape.feature_layer
        return attention_signal(shape, last, ReceivedAttention), Keys(last)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"contextual": draw.number("contextual", 0.0, 0.6)}

    def select(self, image: ImageTokens) -> Selection:
        keys = next(values.mean(1) for signal, values in image.signals.items() if not isinstance(signal, KINDS))
        scores = in_picture(attention_of(image), image)
        places = image.host(image.layout.placeholder)
        kept = []
        joins = torch.full((image.layout.total,), -1, device=image.device)
        weight = torch.ones(image.layout.total, device=image.device)
        for count, available, tiles in tiles_alike(image.layout, image.count):
            which = image.host(tiles)
            contextual = round(count * self.contextual)
            dominant, others = _divided(scores[which], count - contextual, available)
            kept.append(places[which].gather(1, dominant).flatten())
            if contextual == 0:
                continue
            centre, joining, choice, part = _condensed(others, keys[which], contextual)
            centre, joining = places[which].gather(1, centre), places[which].gather(1, joining)
            kept.append(centre.flatten())
            joins[centre.flatten()] = centre.flatten()
            joins[joining.flatten()] = centre.gather(1, choice).flatten()
            weight[joining.flatten()] = part.flatten()
        keep = with_separators(torch.cat(kept), image)
        return Selection(keep, Merge(torch.where(joins < 0, -1, torch.searchsorted(keep, joins)), weight))


def _divided(scores: Tensor, count: int, available: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best patches of each tile, and the others that are in the prompt, in raster order. ``scores (k, N)``."""
    best = top(scores, count)
    later = (scores == -torch.inf).to(torch.uint8).mul(2).scatter(1, best, 1)
    return best, later.sort(dim=1, stable=True).indices[:, : available - count]


def _condensed(others: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``count`` centres ``(k, C)`` out of ``others (k, n)``, and the patches that join them ``(k, n - C)``.

    The latter with the number of their centre, and the part of its weight that each has, 1 / how many joined it.
    ``keys (k, N, head_dim)``.
    """
    step = max(1, others.shape[1] // count)
    central = torch.zeros(others.shape[1], dtype=torch.bool)
    central[: step * count : step] = True
    order = torch.cat([central.nonzero(), (~central).nonzero()])[:, 0].to(others.device, non_blocking=True)
    centre, joining = others[:, order[:count]], others[:, order[count:]]
    _, choice = bipartite_match(rows_of(keys, joining), rows_of(keys, centre))
    members = torch.zeros(centre.shape, device=others.device).scatter_add(
        1, choice, torch.ones_like(choice, dtype=torch.float32)
    )
    return centre, joining, choice, 1 / members.gather(1, choice)
