"""EVS: of a video what differs from the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlprune.image import ImageLayout, ImageTokens, ModelShape, top
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.frames import frames_of
from vlprune.methods.grids import cells, with_separators


@register("evs")
@dataclass(kw_only=True)
class EVS(Method):
    """Efficient Video Sampling: the first frame, and the tokens that are least like the same place of the frame before.

    The score of a token is 1 - cosine of its projected features and those of its place in the frame before. The first frame
    stays whole, and the budget's rest goes to the highest scores of all others together. A budget below one frame keeps the
    centres of an even grid of the first one. Images, which have no frame before, stay whole.

    Deviations from vLLM's code: a budget below one frame is met, too (there: one frame is kept); kept tokens keep their
    positions; of equal scores the earlier token wins. Tokens behind the frames are dropped, unless the budget exceeds the
    patches.
    """

    paper: ClassVar[str] = "Bagrov et al., Efficient Video Sampling, 2025, arXiv:2510.14624"

    budget: int | float = 0.25

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        return Plan(self.count(layout.total) if layout.video else layout.total)

    def select(self, image: ImageTokens) -> Selection:
        layout = image.layout
        count, first = min(image.count, sum(layout.available)), layout.available[0]
        if count < first:
            return Selection(image.host(layout.placeholder[0][cells(*layout.grid, count)[1]].sort().values))
        rows, _ = frames_of(image, torch.nn.functional.normalize(image.features.float(), dim=-1).nan_to_num())
        changes = 1 - (rows[1:] * rows[:-1]).sum(-1)
        # Rounded, so that what stands still is equal everywhere.
        scores = torch.cat([torch.full_like(changes[:1], torch.inf), changes.mul(1e5).round()])
        return Selection(with_separators(image.host(layout.placeholder).flatten()[top(scores.flatten(), count)], image))
