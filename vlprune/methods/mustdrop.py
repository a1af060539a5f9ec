"""MustDrop: similar neighbours are merged, what neither [CLS] nor the text wants is dropped, and the cache follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune import budget as budgets
from vlprune.errors import OptionError
from vlprune.image import CacheTokens, ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens, top
from vlprune.knobs import Draw, ascending
from vlprune.method import Method, Plan, Selection, register
from vlprune.methods.grids import left_by_encoder, with_separators
from vlprune.methods.windows import likeness, merge, windows_of
from vlprune.signals import ClsAttention, MeanAttention, QueryAttention, Signal

CLS, MEAN, TEXT = ClsAttention(layer=-1), MeanAttention(layer=-1), QueryAttention(queries="text", mean_heads=True)
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
        for option in ("merge_share", "keep_rate"):
            if not 0.0 <= getattr(self, option) <= 1.0:
                raise OptionError(f"{option}={getattr(self, option)!r}: allowed is a share from 0 to 1")
        if self.window < 2:
            raise OptionError(f"window={self.window!r}: allowed is an int >= 2 (patches a side)")
        if (self.global_threshold is None) != (self.individual_threshold is None):
            raise OptionError(
                f"global_threshold={self.global_threshold!r}, individual_threshold={self.individual_threshold!r}: "
                "give both to have thresholds decide, or neither to have the budget decide"
            )
        if self.layers is not None:
            self.layers = tuple(self.layers)
            if not self.layers or list(self.layers) != sorted({layer for layer in self.layers if layer >= 0}):
                raise OptionError(f"layers={self.layers!r}: allowed are layers of the LLM from 0 on, in ascending order")

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
        prefill = {start: now for start, before, now in zip(starts, counts, counts[1:], strict=False) if now < before}
        there = Plan(first, prefill).at_layers(depth)
        cached = {i: counts[-1] for i in range(layers[0], starts[-1]) if counts[-1] < there[i]}
        return Plan(first, prefill, cached)

    def _layers(self, depth: int) -> Sequence[int]:
        """``layers`` of an LLM of ``depth`` layers."""
        if self.layers is None:
            return sorted({min(round(layer * depth / OFFICIAL_DEPTH), depth - 2) for layer in OFFICIAL_LAYERS})
        if self.layers[-1] > depth - 2:
            raise OptionError(f"layers={self.layers!r}: this LLM has {depth} layers, so allowed are 0 to {depth - 2}")
        return self.layers

    def _merges(self, layout: ImageLayout, shape: ModelShape) -> int:
        """Windows that are merged in each tile where the budget decides."""
        count, depth = self.count(layout.total), shape.text_layers
        if count == layout.total:
            return 0
        before = self._layers(depth)[0] + 1
        windows, inside, outside = windows_of(layout, self.window)
        most = int((inside | outside).sum(1).min())

        def cost(merges: int) -> int:
            first, lowest = self._ends(layout, merges)
            return first * before + lowest * (depth - before)

        wished = min(int(self.merge_share * windows.shape[0]), most)
        start = max((n for n in range(wished + 1) if self._ends(layout, n)[0] >= count), default=0)
        enough = next((n for n in range(start, most + 1) if cost(n) <= count * depth), None)
        if enough is None:
            raise budgets.unreachable("mustdrop", self.budget, layout.total, cost(most) / depth)
        return enough

    def _ends(self, layout: ImageLayout, merges: int) -> tuple[int, int]:
        """Tokens that enter the LLM, and those that are never dropped, with so many windows merged in each tile."""
        _, _, outside = windows_of(layout, self.window)
        lost = self.window**2 - 1
        tiles = [n - lost * max(0, merges - free) for n, free in zip(layout.available, outside.sum(1).tolist(), strict=True)]
        first = sum(tiles) if merges else max(sum(tiles), self.count(layout.total))
        return first, sum(self._key_tokens(n) for n in tiles)

    def _key_tokens(self, tokens: int) -> int:
        return math.ceil(round(self.keep_rate * tokens, 6))

    def encode_layers(self, layout: ImageLayout, shape: ModelShape) -> Sequence[int]:
        return (0,) if self.adaptive or self._merges(layout, shape) else ()

    def encode(self, tokens: VisionTokens) -> Selection | None:
        device = tokens.hidden.device
        windows, inside, outside = (t.to(device, non_blocking=True) for t in windows_of(tokens.layout, self.window))
        alike = likeness(tokens.hidden.float(), windows)
        alike = alike.masked_fill(~inside, -torch.inf).masked_fill(outside, torch.inf)
        if self.adaptive:
            merges = int((alike >= self.merge_threshold).sum(1).min())
        else:
            merges = self._merges(tokens.layout, tokens.shape)
        return merge(windows[top(alike, merges)], tokens.hidden.shape[1]) if merges else None

    def select(self, image: ImageTokens) -> Selection:
        keep = left_by_encoder(image)
        image.notes["key_set"] = self._key_set(image, keep)
        return Selection(keep if self.adaptive else with_separators(keep, image))

    def _key_set(self, image: ImageTokens, alive: Tensor) -> Tensor:
        """Which of the image's placeholders are never dropped: ``(total,)``."""
        attention = image[CLS if CLS in image.signals else MEAN].mean(1)  # (tiles, patches)
        places, patches, total = image.host(image.layout.placeholder), attention.shape[1], image.layout.total
        flags = torch.zeros(total + 1, dtype=torch.bool, device=image.device)  # one more place takes the padding
        there = flags.index_fill(0, alive, True)[places]
        quotas = image.host(torch.tensor([self._key_tokens(tokens) for tokens in range(patches + 1)]))
        best = torch.arange(patches, device=image.device) < quotas[there.sum(1)][:, None]
        key = torch.zeros_like(there).scatter(1, top(attention.masked_fill(~there, -torch.inf), patches), best)
        return flags.scatter(0, torch.where(key, places, total).flatten(), True)[:total]

    def prefill(self, tokens: LayerTokens) -> Selection:
        attention = tokens[TEXT][0]  # (text tokens, N)
        wanted = attention.sum(0)
        key = tokens.notes["key_set"][tokens.positions]
        if self.global_threshold is not None and self.individual_threshold is not None:
            weak = (wanted < self.global_threshold * wanted.sum()) & (attention.amax(0) < self.individual_threshold)
            keep = (~weak | key).nonzero()[:, 0]
        else:
            keep = top(wanted.masked_fill(key, torch.inf), tokens.count).sort().values
        alive = torch.zeros_like(tokens.notes["key_set"])
        tokens.notes["survivors"] = alive.index_fill(0, tokens.positions[keep], True)
        return Selection(keep)

    def evict(self, tokens: CacheTokens) -> Selection:
        alive = tokens.notes["survivors"][tokens.positions]
        return Selection(alive.nonzero()[:, 0] if self.adaptive else top(alive.float(), tokens.count))
