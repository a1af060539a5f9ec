"""VFlowOpt: what the encoder's global patches attend to is kept, and cells of the grid take in what is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlprune import budget as budgets
from vlprune.errors import OptionError
from vlprune.image import ImageLayout, ImageTokens, LayerTokens, ModelShape, top
from vlprune.knobs import Draw
from vlprune.method import Merge, Method, Plan, Selection, register
from vlprune.methods.grids import divided
from vlprune.methods.salience import attention_by_place, number_or_lowest
from vlprune.methods.staged import best, scaled, staged_plan
from vlprune.signals import GlobalAttention, Signal


@register("vflowopt")
@dataclass(kw_only=True)
class VFlowOpt(Method):
    """VFlowOpt: an importance map, recycling of the least important tokens into cells of the grid, and two drops in the LLM.

    The importance of a patch is the attention that it receives in the last vision block from global patches, those that
    receive more than ``threshold`` times the mean themselves (mean over heads; where there is none, from all). Row ends have
    importance 1, more than any patch. Of ``T`` tokens of an image of ``L``, ``T - int(L / cell^2)`` are the most important
    ones. The rest falls into ``int(L / cell^2)`` cells of nearly equal size: each becomes one token, the mean of its members
    weighted by importance, in the place of the most important of them. A cell that has no members leaves its token to the
    most important of those left over.

    Before layers 9 and 18 of 28 of the LLM the shares ``keep`` of the tokens that are there stay, by the same map; recycled
    tokens have the importance of their place. With shares of 1, the default, nothing leaves there. Otherwise ``budget`` is the
    mean over the LLM's layers, and as many tokens enter as it allows.

    ``threshold``, ``cell`` (patches): the published optima for 25 % of the tokens of LLaVA-OneVision-7B.

    Deviations from the official code: cells are as many as the tokens that they become, so that the budget is met exactly
    (there: squares of ``cell`` patches, also empty ones); every image recycles, videos and one of several images as well;
    projected features are merged; where no patch is global, all are (there: no number); the entropy of patches, whose weight
    is 0 in all published optima, is not here. Published for 25 %: ``keep=(0.9833, 0.8773)``, for 10 % ``(1.0, 0.6011)``.
    """

    paper: ClassVar[str] = "Yang et al., VFlowOpt, ICCV 2025, arXiv:2508.05211"

    budget: int | float = 0.25
    threshold: float = 34.76
    cell: float = 15.58
    keep: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep = (self.keep[0], self.keep[1])
        if not all(0.0 < share <= 1.0 for share in self.keep):
            raise OptionError(f"keep={self.keep!r}: allowed are two shares above 0 and up to 1")
        if not 0.0 <= self.threshold < float("inf"):
            raise OptionError(f"threshold={self.threshold!r}: allowed is a multiple >= 0 of the mean attention received")
        if not 1.0 <= self.cell < float("inf"):
            raise OptionError(f"cell={self.cell!r}: allowed is a width >= 1 of cells in patches")

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"threshold": draw.number("threshold", 0.0, 50.0), "cell": draw.number("cell", 3.0, 24.0)}

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (GlobalAttention(shape.vision_layers - 1, threshold=self.threshold),)

    @property
    def stages(self) -> tuple[str, ...]:
        return ("select",) if self.keep == (1.0, 1.0) else ("select", "prefill")

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        if self.keep == (1.0, 1.0) or self.count(layout.total) == layout.total:
            return super().plan(layout, shape)
        depth, total = shape.text_layers, layout.total
        shares = dict(zip(scaled((9, 18), 28, depth), (self.keep[0], self.keep[0] * self.keep[1]), strict=True))

        def plan(entering: int) -> Plan:
            return staged_plan(entering, {layer: budgets.tokens(float(share), entering) for layer, share in shares.items()})

        room = max(budgets.room(self.budget, total, depth), depth)
        return plan(budgets.largest(lambda entering: sum(plan(entering).at_layers(depth)), room, total))

    def prefill(self, tokens: LayerTokens) -> Selection:
        return best(tokens, tokens.notes["vflowopt_importance"][tokens.positions])

    def select(self, image: ImageTokens) -> Selection:
        total, separators = image.layout.total, image.layout.separators
        scores = number_or_lowest(attention_by_place(image)).index_fill(0, image.host(separators), 1.0)
        image.notes["vflowopt_importance"] = scores
        cells = min(int(total / self.cell**2), image.count, total - separators.shape[0])
        order = top(scores, total)
        if cells == 0:
            return Selection(order[: image.count].sort().values)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(total, device=image.device))
        stays = place < image.count - cells
        cell = image.host(divided(image.layout, cells)[1])
        cell = torch.where(cell < 0, cells, cell)
        # The best member of every cell, and whether it has any; one more cell has what lies in none.
        first = torch.full((cells + 1,), total, device=image.device)
        first = first.scatter_reduce(0, cell, place.masked_fill(stays, total), "amin")
        leads = (place == first[cell]) & (cell < cells)
        keep = top((2.0 * stays + 1.0 * leads) * total - place, image.count).sort().values
        slot = torch.full((total,), -1, device=image.device).index_copy(0, keep, torch.arange(len(keep), device=image.device))
        lead = order[first[cell].clamp(max=total - 1)]
        joins = torch.where((slot < 0) & (cell < cells), slot[lead], torch.where(leads, slot, -1))
        return Selection(keep, Merge(joins, scores.clamp(min=0)))
