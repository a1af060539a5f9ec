"""HoloV: the budget is spread over parts of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.image import ImageTokens, ModelShape, remembered, top
from vlprune.knobs import Draw
from vlprune.method import Method, Selection, register
from vlprune.methods.grids import left_by_encoder, with_separators
from vlprune.methods.salience import attention_by_place, attention_signal, number_or_lowest, ranks
from vlprune.signals import ReceivedAttention, Signal


@register("holov")
@dataclass(kw_only=True)
class HoloV(Method):
    """HoloV: runs of the prompt's patches share the budget by their attention and by how their features vary.

    The patches of an image, in the order of the prompt, are cut into ``chunks`` runs of equal length, the first ones longer
    by one if need be. With ``a`` the [CLS] attention (mean over heads, block whose output goes to the projector) and S the
    cosines of a run's projected features, the diagonal set to 0, each of its ``n`` patches has

        mu = sum(S) / (n - 1),   var = sum((S - mu)^2) / (n - 1),   v = var mean(1000 a) / (mean(var) + 1e-6)

    and the run's score is the mean of ``1000 a + variety v``; that of a single patch is ``a``. Of ``T`` tokens a run gets
    ``floor(T score / (sum of scores + 1e-6))``, and what is left goes one by one to the runs with the highest scores. Each run
    keeps its patches with the most attention.

    ``chunks``: how many runs. ``variety``: weight of the variance; since ``v`` has the mean of ``1000 a`` unless a run varies
    by less than 1e-6, it hardly changes how runs compare.

    Deviations from the official code: what a run cannot take goes to the others, the highest scores first (there: rows of
    zeros take its place; in the paper it is redistributed); kept tokens keep their order and positions; each image has a
    budget and runs of its own; scores are float32. Row ends are dropped, as there, unless the budget exceeds the patches.
    Encoders without [CLS]: the attention that a patch receives, in the order of the prompt.
    """

    paper: ClassVar[str] = "Zou et al., HoloV, NeurIPS 2025, arXiv:2510.02912"

    budget: int | float = 1 / 9
    chunks: int = 16
    variety: float = 0.09

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.chunks) is not int or self.chunks < 1:
            raise OptionError(f"chunks={self.chunks!r}: allowed is an int >= 1")
        if not 0.0 <= self.variety < float("inf"):
            raise OptionError(f"variety={self.variety!r}: allowed is a weight >= 0")

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (attention_signal(shape, shape.feature_layer, ReceivedAttention),)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"chunks": draw.whole("chunks", 1, 32), "variety": draw.number("variety", 0.0, 1.0)}

    def select(self, image: ImageTokens) -> Selection:
        patches = left_by_encoder(image)
        total = patches.shape[0]
        count = min(image.count, total)
        index, seat = map(image.host, _runs(total, min(self.chunks, total)))
        present = index >= 0
        attention = number_or_lowest(attention_by_place(image)[patches])
        weights = attention.clamp(min=0)[index.clamp(min=0)] * present
        features = image.features[patches].float()[index.clamp(min=0)] * present[..., None]
        shares = self._shares(weights, features, present)
        given = (shares * count + 1e-3).floor()
        spare = ranks(shares[None])[0] < count - given.sum()
        # A seat's worth: how many more its run may give away. Below zero, runs of higher score go first.
        place = ranks(attention[index.clamp(min=0)].masked_fill(~present, -torch.inf))
        worth = (given + spare)[:, None] - place + 0.5 * shares[:, None]
        keep = top(worth.flatten()[seat], count)
        return Selection(with_separators(patches[keep], image))

    def _shares(self, attention: Tensor, features: Tensor, present: Tensor) -> Tensor:
        """Each run's part of the budget ``(runs,)``, in all at most 1. Runs ``(runs, n)`` are filled up with zeros."""
        size = present.sum(1)
        pairs = present[:, :, None] & present[:, None]
        unit = torch.nn.functional.normalize(features, dim=-1)
        cosines = (unit @ unit.transpose(1, 2)).masked_fill(torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device), 0)
        others = (size - 1).clamp(min=1)[:, None]
        mean = cosines.sum(-1) / others
        variance = ((cosines - mean[..., None]).square() * pairs).sum(-1) / others
        level, varies = 1000 * attention.sum(1) / size, variance.sum(1) / size
        scores = level + self.variety * varies * level / (varies + 1e-6)
        scores = torch.where(size == 1, attention.sum(1), scores)
        # Rounded, so that runs that differ by rounding errors only are equal.
        return (scores / (scores.sum() + 1e-6)).mul(1e5).round() / 1e5


@remembered
def _runs(total: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Patches of each run ``(chunks, longest)``, -1 behind shorter ones, and each patch's place in it, flat ``(total,)``."""
    size, longer = divmod(total, chunks)
    longest = size + (longer > 0)
    index, first = torch.full((chunks, longest), -1), 0
    for run in range(chunks):
        last = first + size + (run < longer)
        index[run, : last - first] = torch.arange(first, last)
        first = last
    return index, (index >= 0).flatten().nonzero()[:, 0]
