"""Visual exit: from one layer of the LLM on there are no visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlprune import budget as budgets
from vlprune import options
from vlprune.errors import OptionError
from vlprune.image import ImageLayout, LayerTokens, ModelShape
from vlprune.method import Method, Plan, Selection, register


@register("exit")
@dataclass(kw_only=True)
class VisualExit(Method):
    """Visual exit: all visual tokens leave before one LLM layer. By then the text has read what it needs, or has not.

    ``layer``: LLM layer from which on there are none, counted from 0, at least 1. None: as many whole layers as ``budget``,
    the mean over the LLM's layers, allows; it is met to less than one layer.
    """

    budget: int | float = 0.75
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.layer < 1:
            raise OptionError(f"layer={self.layer!r}: allowed is an LLM layer from 1 on; before it the text reads the image")

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total, depth = layout.total, shape.text_layers
        if self.layer is not None:
            options.in_model("layer", self.layer, depth)
        layer = budgets.room(self.budget, total, depth) // max(total, 1) if self.layer is None else self.layer
        if layer < 1:
            raise budgets.unreachable(self.name, self.budget, total, total / depth)
        return Plan(total, {layer: 0} if layer < depth else {})

    def prefill(self, tokens: LayerTokens) -> Selection:
        return nothing(tokens)


def nothing(tokens: LayerTokens) -> Selection:
    """No visual token stays."""
    return Selection(tokens.visual.new_zeros(0))


def everything(tokens: LayerTokens) -> Selection:
    """All visual tokens stay."""
    return Selection(torch.arange(tokens.visual.shape[0], device=tokens.visual.device))
