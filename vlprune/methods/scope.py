"""SCOPE: each token chosen covers what those before it leave uncovered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.image import ImageTokens, ModelShape
from vlprune.knobs import Draw
from vlprune.method import Method, Selection, register
from vlprune.methods.grids import with_separators
from vlprune.methods.salience import attention_of, attention_signal, in_picture, tiles_alike
from vlprune.signals import Signal


@register("scope")
@dataclass(kw_only=True)
class SCOPE(Method):
    """Saliency-Coverage Oriented token Pruning: greedy facility location, weighted by attention.

    Tokens of a tile are chosen one by one. With ``c_i`` the largest cosine of patch ``i`` to those chosen so far (0 at
    first), each is the patch ``j`` with the highest ``a_j^alpha sum over i of max(0, cos(i, j) - c_i)``; ``a`` is the [CLS]
    attention (mean over heads) in the block whose output goes to the projector. Of equal ones the lowest index goes first.

    ``alpha``: how much attention counts; 0 leaves it out.

    Deviations from the official code: cosines are those of projected features; every tile of an image covers itself, with an
    equal share of the budget; kept tokens keep their positions. Row ends are dropped unless the budget exceeds the patches.
    Encoders without [CLS]: the attention of a tile's mean query.
    """

    paper: ClassVar[str] = "Deng et al., SCOPE, NeurIPS 2025, arXiv:2510.24214"

    budget: int | float = 1 / 9
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha < float("inf"):
            raise OptionError(f"alpha={self.alpha!r}: allowed is an exponent >= 0")

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (attention_signal(shape, shape.feature_layer),)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"alpha": draw.number("alpha", 0.0, 4.0)}

    def select(self, image: ImageTokens) -> Selection:
        scores = in_picture(attention_of(image), image)
        places = image.host(image.layout.placeholder)
        unit = torch.nn.functional.normalize(image.features.float(), dim=-1).nan_to_num()
        kept = []
        for share, _, tiles in tiles_alike(image.layout, image.count):
            own = places[image.host(tiles)]
            rows = unit[own.clamp(min=0)] * (own >= 0)[..., None]
            weight = scores[image.host(tiles)]
            weight = torch.where(weight == -torch.inf, weight, weight.clamp(min=0) ** self.alpha)
            kept.append(own.gather(1, _covering(rows, weight, share)).flatten())
        return Selection(with_separators(torch.cat(kept), image))


def _covering(rows: Tensor, weight: Tensor, count: int) -> Tensor:
    """``(k, count)`` of the unit ``rows (k, N, D)``, in the order chosen. ``weight (k, N)``, -inf for what is not there."""
    cosine = rows @ rows.transpose(1, 2)
    cover = torch.zeros_like(weight)
    chosen = torch.empty(len(rows), count, dtype=torch.long, device=rows.device)
    for number in range(count):
        gain = (cosine - cover[:, :, None]).clamp(min=0).sum(1) * weight.clamp(min=0)
        best = gain.masked_fill(weight == -torch.inf, -torch.inf).argmax(1, keepdim=True)
        chosen[:, number] = best[:, 0]
        covered = cosine.gather(2, best[:, None].expand(-1, cosine.shape[1], -1))[..., 0]
        cover = torch.maximum(cover, covered)
        weight = weight.scatter(1, best, -torch.inf)
    return chosen
