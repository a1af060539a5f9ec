"""MustDrop: similar neighbours are merged, what neither [CLS] nor the text wants is dropped, and the cache follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vlprune import budget as budgets
from vlprune import options
from vlprune.errors import OptionError
from vlprune.image import CacheTokens, ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens, top
from vlprune.knobs import Draw, ascending
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.grids import left_by_encoder, with_separators
from vlprune.methods.salience import attention_of, best_share_of_tiles
from vlprune.methods.staged import TEXT, best, staged_plan
from vlprune.methods.windows import left_by_merging, merge_alike, mergeable, merges_within
from vlprune.signals import ClsAttention, MeanAttention, Signal

CLS, MEAN = ClsAttention(layer=-1), MeanAttention(layer=-1)
OFFICIAL_LAYERS, OFFICIAL_DEPTH = (2, 6, 10, 14), 32


@register("mustdrop")
@dataclass(kw_only=True)
class MustDrop(Method):
    """MustDrop: drops visual tokens in the vision encoder, at several layers of the LLM, and in the cache.

    After block 0 of the encoder, windows of ``window`` x ``window`` neighbours with a high mean cosine similarity of their
    pairs become their plain average. Of the ``n`` tokens that a tile has then, the ``ceil(keep_rate n)`` to which [CLS] pays
    most attention in the last block are its key set, which is never dropped. (Encoders without [CLS]: the tile's mean query.)
    After each of ``layers``, tokens go that the text looks at neither as a whole nor with any one of its tokens: attention of
    the text behind an image's start, averaged over heads. Once the prompt is read, the caches of the first to the last of
    ``layers`` lose all tokens that did not survive the last of them.

    How many go, with both thresholds: a window is merged at a similarity of ``merge_threshold`` or more, as many in each tile
    of an image; of other than key tokens, j goes if the text's summed attention is below ``global_threshold`` of the sum over
    all tokens of the image, and no text token pays it ``individual_threshold``. This is the paper's method; counts then depend
    on the content, the host waits for them, and ``budget`` is not looked at. With neither (both None): the most similar
    ``merge_share`` of the windows are merged, fewer where the budget leaves room for their tokens, more where it would not
    hold the rest. Then counts fall by one factor from layer to layer, never below the key set, so that their mean over the
    LLM's layers meets ``budget``; key tokens stay first, then those with the largest sums. Nothing waits.

    ``layers``: LLM layers after which tokens go, from 0 to the last but one. None: 2, 6, 10 and 14 of 32, scaled to the model.

    Deviations from the official code: a merged token stays at its window's centre, and kept tokens keep their positions, in
    the LLM and while text is generated. As many windows are merged in each tile of one image, not of the batch. Windows that
    lie in the padding of crops are merged first, those that straddle its edge never. Patches that fill no window are left
    alone. Row ends are dropped, as there, unless the budget exceeds the patches.
    """

    paper: ClassVar[str] = "Liu et al., Multi-Stage Vision Token Dropping (MustDrop), arXiv:2411.10803"

    budget: int | float = 0.2
    merge_threshold: float = 0.8
    merge_share: float = 0.25
    window: int = 3
    keep_rate: float = 0.08
    layers: Sequence[int] | None = None
    global_threshold: float | None = None
    individual_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        options.share("merge_share", self.merge_share)
        options.share("keep_rate", self.keep_rate)
        if self.window < 2:
            raise OptionError(f"window={self.window!r}: allowed is an int >= 2 (patches a side)")
        options.both_or_neither(self, "global_threshold", "individual_threshold", otherwise="the budget decides")
        if self.layers is not None:
            self.layers = options.ascending_layers("layers", self.layers, first=0)

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        stages = draw.whole("stages", 1, min(len(OFFICIAL_LAYERS), shape.text_layers - 1))
        return {
            "window": draw.whole("window", 2, 3),
            "merge_share": draw.number("merge_share", 0.0, 0.8),
            "keep_rate": draw.number("keep_rate", 0.0, 0.2),
            "layers": ascending(draw, f"{stages} layers", stages, 0, shape.text_layers - 2),
        }

    @property
    def adaptive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether thresholds decide."""
        return self.global_threshold is not None

    def wants(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (CLS if shape.has_cls else MEAN, TEXT)

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total, count, depth = layout.total, self.count(layout.total), shape.text_layers
        layers = self._layers(depth)
        starts = [layer + 1 for layer in layers]
        if self.adaptive:
            most = sum(layout.available)
            return Plan(most, dict.fromkeys(starts, most), dict.fromkeys(range(layers[0], starts[-1]), most))
        if count == total:
            return Plan(total)
        first, lowest = self._ends(layout, self._merges(layout, shape))
        counts = budgets.geometric(first, lowest, budgets.lengths(starts, depth), count * depth)
        plan = staged_plan(first, dict(zip(starts, counts[1:], strict=True)))
        there = plan.at_layers(depth)
        return replace(plan, cached={i: counts[-1] for i in range(layers[0], starts[-1]) if counts[-1] < there[i]})

    def _layers(self, depth: int) -> Sequence[int]:
        """``layers`` of an LLM of ``depth`` layers."""
        if self.layers is None:
            return sorted({min(round(layer * depth / OFFICIAL_DEPTH), depth - 2) for layer in OFFICIAL_LAYERS})
        return options.in_model("layers", self.layers, depth, last=depth - 2)

    def _merges(self, layout: ImageLayout, shape: ModelShape) -> int:
        """Windows that are merged in each tile where the budget decides."""
        count, depth = self.count(layout.total), shape.text_layers
        if count == layout.total:
            return 0
        before = self._layers(depth)[0] + 1

        def cost(merges: int) -> int:
            return budgets.stepped(*self._ends(layout, merges), before, depth)

        merges = merges_within(layout, self.window, self.merge_share, count, lambda n: cost(n) <= count * depth)
        if merges is None:
            lowest = cost(mergeable(layout, self.window)) / depth
            raise budgets.unreachable(self.name, self.budget, layout.total, lowest)
        return merges

    def _ends(self, layout: ImageLayout, merges: int) -> tuple[int, int]:
        """Tokens that enter the LLM, and those that are never dropped, with so many windows merged in each tile."""
        tiles = left_by_merging(layout, self.window, merges)
        first = sum(tiles) if merges else max(sum(tiles), self.count(layout.total))
        return first, sum(budgets.rounded_up(self.keep_rate, tokens) for tokens in tiles)

    def encode_layers(self, layout: ImageLayout, shape: ModelShape) -> Sequence[int]:
        return (0,) if self.adaptive or self._merges(layout, shape) else ()

    def encode(self, tokens: VisionTokens) -> Selection | None:
        merges = None if self.adaptive else self._merges(tokens.layout, tokens.shape)
        return merge_alike(tokens, self.window, merges, self.merge_threshold)

    def select(self, image: ImageTokens) -> Selection:
        keep = left_by_encoder(image)
        image.notes["key_set"] = best_share_of_tiles(attention_of(image), self.keep_rate, keep, image)
        return Selection(keep if self.adaptive else with_separators(keep, image))

    def prefill(self, tokens: LayerTokens) -> Selection:
        attention = tokens[TEXT][0]  # (text tokens, N)
        wanted = attention.sum(0)
        key = tokens.notes["key_set"][tokens.positions]
        if self.global_threshold is not None and self.individual_threshold is not None:
            weak = (wanted < self.global_threshold * wanted.sum()) & (attention.amax(0) < self.individual_threshold)
            chosen = Selection((~weak | key).nonzero()[:, 0])
        else:
            chosen = best(tokens, wanted.masked_fill(key, torch.inf))
        nobody = torch.zeros_like(tokens.notes["key_set"])
        tokens.notes["survivors"] = nobody.index_fill(0, tokens.positions[chosen.keep], True)
        return chosen

    def evict(self, tokens: CacheTokens) -> Selection:
        alive = tokens.notes["survivors"][tokens.positions]
        return Selection(alive.nonzero()[:, 0] if self.adaptive else top(alive.float(), tokens.count))
