"""FlowCut: patches leave the vision encoder step by step, by how information flows between [CLS] and them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlprune import budget as budgets
from vlprune import options
from vlprune.errors import BudgetError
from vlprune.image import ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.grids import left_by_encoder, with_separators
from vlprune.methods.salience import best_of_encoder, normalised, value_affinity
from vlprune.methods.staged import best, staged_plan
from vlprune.signals import ClsAttention, ClsValues, MeanAttention, QueryAttention, Signal, Values

CLS, CLS_VALUE, MEAN, PATCH_VALUES = ClsAttention(), ClsValues(), MeanAttention(), Values()
LAST, TEXT_VALUES = QueryAttention(queries="last"), Values(tower="text")
LLM_LAYER = 2


@register("flowcut")
@dataclass(kw_only=True)
class FlowCut(Method):
    """FlowCut: prunes inside the vision encoder, every second block, and once inside the LLM where there are many tiles.

    A patch scores by (attention of [CLS] to it + affinity of its value to that of [CLS]) x L1 norm of its value, smoothed over
    blocks with weight 1/2. After every second block, the last one before the features' block included, the patches with the
    lowest scores leave. How many: ``(n - T) / sqrt(blocks left) * (1 - (H / ln n)^2)``, where H is the entropy of [CLS]'s
    attention to the ``n`` patches that are there; after the last of these blocks T are left, in raster order.

    An image of one tile has ``T`` tokens from there on. With several tiles, thumbnail and crops or the frames of a video, each
    tile keeps ``int(5 T / (2 tiles))`` patches, int(T / 2) of five tiles; then, before LLM layer 2, ``T`` tokens are left:
    those with the highest (attention of the prompt's last token + affinity of their value to its value) x L1 norm of their
    value, all of LLM layer 1. Encoders without [CLS] use the tile's mean query in its place and no affinity; there an image
    of one tile keeps ``min(2 T, all)`` in the encoder and ``T`` from LLM layer 2 on.

    ``target``: the paper's T, a number of visual tokens >= 1; then ``budget`` is not looked at. None: the largest T whose mean
    over the LLM's layers meets the budget; what is left of it goes to the LLM's layers from 2 on.
    ``schedule``: ``"entropy"`` is the formula above, for which the host waits for the device at every second block. ``"even"``
    drops ``(n - T) / (prunings left)``, rounded up, and never waits. Both end with the same number.

    Deviations from the official code: kept tokens keep their positions in the LLM; the number to drop is the largest among the
    tiles of an image, not of the batch; patches that lie in the padding of crops go first, and row ends go with the first
    patches; scores are float32, and an attention of zero adds nothing to the entropy (NaN there). Without [CLS]: visual
    tokens are pruned, not the patches that are merged into them, and blocks count back from the one before the features'.
    """

    paper: ClassVar[str] = "Tong et al., FlowCut, NeurIPS 2025, arXiv:2505.19536"

    budget: int | float = 0.2
    target: int | None = None
    schedule: Literal["entropy", "even"] = "entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and (type(self.target) is not int or self.target < 1):
            raise BudgetError(f"target={self.target!r}: allowed is an int >= 1 (visual tokens of an image) or None")
        options.one_of("schedule", self.schedule, ("entropy", "even"))

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        early = (CLS, CLS_VALUE) if shape.has_cls else (MEAN,)
        return (*early, PATCH_VALUES, LAST, TEXT_VALUES)

    def count(self, total: int) -> int:
        return super().count(total) if self.target is None else min(self.target, total)

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        target = self._target(layout, shape)
        if target == layout.total:
            return Plan(target)
        entering, layers = _entering(layout, shape, target), shape.text_layers
        if self.target is None and layers > LLM_LAYER:
            room = self.count(layout.total) * layers - entering * LLM_LAYER
            target = max(target, room // (layers - LLM_LAYER))
        return _plan(entering, target, layers)

    def _target(self, layout: ImageLayout, shape: ModelShape) -> int:
        """The paper's T."""
        total, layers = layout.total, shape.text_layers
        count = self.count(total)
        if self.target is not None or count == total:
            return count

        def cost(target: int) -> int:
            return sum(_plan(_entering(layout, shape, target), target, layers).at_layers(layers))

        if cost(1) > count * layers:
            raise budgets.unreachable(self.name, self.budget, total, cost(1) / layers)
        return budgets.largest(cost, count * layers, total)

    def encode_layers(self, layout: ImageLayout, shape: ModelShape) -> Sequence[int]:
        target = self._target(layout, shape)
        idle = target == layout.total or _in_tile(layout, shape, target) == layout.placeholder.shape[1]
        return () if idle else range(shape.feature_layer)

    def encode(self, tokens: VisionTokens) -> Selection | None:
        inflow, score = _flow(tokens)
        score = tokens.carry["score"] = 0.5 * tokens.carry.get("score", score) + 0.5 * score
        present, target = score.shape[1], self._target(tokens.layout, tokens.shape)
        leaving = self._leaving(inflow, present - _in_tile(tokens.layout, tokens.shape, target), tokens)
        return Selection(best_of_encoder(score, tokens, present - leaving)) if leaving else None

    def _leaving(self, inflow: Tensor, spare: int, tokens: VisionTokens) -> int:
        """How many of a tile's patches leave, of ``spare`` that have to in the end. ``inflow (tiles, n)`` adds up to 1."""
        blocks_left = tokens.shape.feature_layer - 1 - tokens.layer
        if spare == 0 or blocks_left % 2:
            return 0
        if blocks_left == 0:
            return spare
        if self.schedule == "even":
            return math.ceil(spare / (blocks_left // 2 + 1))
        # The tile whose attention is most concentrated decides for all. What is no number says nothing.
        entropy = torch.special.entr(inflow).sum(1).nan_to_num(torch.inf).min().item() / math.log(inflow.shape[1])
        return round(spare / math.sqrt(blocks_left) * (1 - min(entropy, 1.0) ** 2))

    def select(self, image: ImageTokens) -> Selection:
        return Selection(with_separators(left_by_encoder(image), image))

    def prefill(self, tokens: LayerTokens) -> Selection:
        inflow = normalised(normalised(tokens[LAST][:, 0]).mean(0))
        values = tokens.rows(TEXT_VALUES)  # (kv_heads, rows, head_dim)
        visual = values[:, tokens.visual]
        affinity = value_affinity(visual, values[:, tokens.last] * values.shape[-1] ** -0.5).mean(0)
        return best(tokens, (inflow + normalised(affinity)) * visual.mean(0).abs().sum(-1))


def _flow(tokens: VisionTokens) -> tuple[Tensor, Tensor]:
    """Inflow, what [CLS] or the mean query attends to, as a distribution, and the scores of one block: ``(tiles, n)`` each."""
    values = tokens[PATCH_VALUES]
    density = values.mean(1).abs().sum(-1)
    if not tokens.shape.has_cls:
        inflow = normalised(tokens[MEAN].mean(1))
        return inflow, inflow * density
    inflow = normalised(tokens[CLS].mean(1))
    # Unscaled, as in the official code. The weight of [CLS] itself differs from head to head, so it matters to their mean.
    own = tokens[CLS_VALUE]
    affinity = value_affinity(torch.cat([own[:, :, None], values], 2), own)[..., 1:].mean(1)
    return inflow, (inflow + normalised(affinity)) * density


def _in_tile(layout: ImageLayout, shape: ModelShape, target: int) -> int:
    """Patches that the encoder leaves in each tile."""
    alone = target if shape.has_cls else 2 * target
    count = alone if layout.tiles == 1 else max(1, 5 * target // (2 * layout.tiles))
    return min(count, layout.placeholder.shape[1])


def _entering(layout: ImageLayout, shape: ModelShape, target: int) -> int:
    """Tokens that enter the LLM: the patches left that are in the prompt, and row ends where ``target`` exceeds those."""
    count = _in_tile(layout, shape, target)
    patches = sum(min(count, available) for available in layout.available)
    return patches if count < layout.placeholder.shape[1] else max(patches, target)


def _plan(entering: int, target: int, layers: int) -> Plan:
    return staged_plan(entering, {LLM_LAYER: target} if layers > LLM_LAYER else {})
