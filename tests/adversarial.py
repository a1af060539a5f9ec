"""One image on its whole way through a method, from the encoder to the cache: made by hand, random or adversarial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests import inside
from vlprune.engine.choosing import asks
from vlprune.engine.merging import merged
from vlprune.image import CacheTokens, ImageLayout, ImageTokens, ModelShape, VisionTokens
from vlprune.integrations.layouts import tiles_in_a_row
from vlprune.integrations.llava import anyres, single
from vlprune.method import Merge, Method, Selection
from vlprune.signals import AttentionSupport, ClsValues, Hidden, Keys, ModuleDelta, Signal, SinkShare, Values

LAYOUTS: dict[str, Callable[[], ImageLayout]] = {
    "one tile": lambda: single(6),
    "one patch": lambda: single(1),
    "padded crops": lambda: anyres(30, 84, 4, 28, ((56, 84),)),
    "frames of a video": lambda: tiles_in_a_row(3, (2, 3), separators=1, video=True),
}
SHAPES = {
    "[CLS]": inside.SHAPE,
    "no [CLS]": ModelShape(vision_layers=4, text_layers=8, feature_layer=3, has_cls=False),
}
HEADS, KV_HEADS = 4, 2


def _holes(make: Callable[..., Tensor], of_vectors: bool) -> Callable[..., Tensor]:
    """Every third entry is NaN, and one infinite."""

    def holed(generator: torch.Generator, *shape: int) -> Tensor:
        values = make(generator, *shape)
        rows = values.transpose(-1, -2) if of_vectors else values
        rows[..., ::3], rows[..., 1:2] = torch.nan, torch.inf
        return values

    return holed


CONTENTS = inside.CONTENTS | {"no numbers": tuple(_holes(make, i == 1) for i, make in enumerate(inside.CONTENTS["random"]))}


@dataclass
class Answer:
    """What a method chose when it was asked, of how many rows, and what has become of them."""

    stage: str
    layer: int | None
    rows: int
    selection: Selection
    changed: Tensor

    def same(self, other: Answer) -> bool:
        return (self.stage, self.layer, self.rows) == (other.stage, other.layer, other.rows) and all(
            torch.equal(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True)
        )

    def tensors(self) -> list[Tensor]:
        merge = self.selection.merge
        parts = [] if merge is None else [merge.weight, merge.target if isinstance(merge, Merge) else None]
        return [self.selection.keep, *(part for part in parts if part is not None)]


@dataclass
class Journey:
    """``answers`` in the order in which ``method`` was asked about an image, and the ``notes`` that it took."""

    method: Method
    layout: ImageLayout
    content: str = "random"
    shape: ModelShape = inside.SHAPE
    seed: int = 0
    answers: list[Answer] = field(default_factory=list)
    notes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.weights, self.vectors = (self._seeded(make) for make in CONTENTS[self.content])
        self.plan = self.method.plan(self.layout, self.shape)

    def _seeded(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *shape: make(self.generator, *shape)

    def run(self) -> list[Answer]:
        """All that the method is asked; nothing where all tokens are to stay."""
        if asks(self.method, self.layout, self.plan):
            alive = self._select(self._encode())
            self._evict(self._prefill(alive))
        return self.answers

    def _answered(self, stage: str, layer: int | None, rows: Tensor, selection: Selection) -> Tensor:
        """Notes the answer; gives the rows ``(..., n, D)`` with what was merged into them."""
        changed = merged(rows if selection.keep.ndim == rows.ndim - 1 else rows[0], selection)
        self.answers.append(Answer(stage, layer, rows.shape[-2], selection, changed))
        return changed

    def _encode(self) -> Tensor | None:
        """Placeholders left by the encoder, None for all."""
        layers = self.method.encode_layers(self.layout, self.shape) if "encode" in self.method.stages else ()
        tiles, count = self.layout.placeholder.shape
        hidden, patches = self.vectors(tiles, count, inside.WIDTH), torch.arange(count).expand(tiles, -1)
        carry: dict[str, Tensor] = {}
        for layer in layers:
            signals = {s: self._of_tiles(s, patches.shape[1]) for s in self.method.wants(self.shape) if s.tower == "vision"}
            tokens = VisionTokens(layer, hidden, patches, self.layout, self.shape, signals, carry, self.notes)
            selection = self.method.encode(tokens)
            if selection is None:
                continue
            keep = selection.keep
            hidden = self._answered("encode", layer, hidden, selection)
            hidden = hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))
            patches, carry = patches.gather(1, keep), {name: values.gather(1, keep) for name, values in carry.items()}
        places = self.layout.placeholder.gather(1, patches)
        return places[places >= 0].sort().values if layers else None

    def _of_tiles(self, signal: Signal, rows: int) -> Tensor:
        tiles, width = self.layout.tiles, inside.WIDTH
        if isinstance(signal, (Keys, Values)):
            return self.vectors(tiles, HEADS, rows, width)
        if isinstance(signal, ClsValues):
            return self.vectors(tiles, HEADS, width)
        if isinstance(signal, (Hidden, ModuleDelta)):
            return self.vectors(*(2,) * isinstance(signal, ModuleDelta), tiles, rows, width)
        return self.weights(tiles, HEADS, rows)

    def _select(self, alive: Tensor | None) -> Tensor:
        """Placeholders that enter the LLM."""
        if "select" not in self.method.stages:
            return torch.arange(self.layout.total)
        features, patches = self.vectors(self.layout.total, inside.WIDTH), self.layout.placeholder.shape[1]
        signals = {s: self._of_tiles(s, patches) for s in self.method.wants(self.shape) if s.tower == "vision"}
        if alive is not None:
            there = torch.zeros(self.layout.total + 1, dtype=torch.bool).index_fill(0, alive, True)
            features = features.masked_fill(~there[:-1, None], 0)
            gone = ~there[self.layout.placeholder]
            signals = {s: v if isinstance(s, ClsValues) else v.masked_fill(_shaped(gone, s), 0) for s, v in signals.items()}
        image = ImageTokens(features, self.layout, self.plan.entering, signals, alive, self.notes)
        selection = self.method.select(image)
        self._answered("select", None, features, selection)
        return selection.keep

    def _prefill(self, alive: Tensor) -> dict[int, Tensor]:
        """Placeholders that are there in each layer."""
        there: dict[int, Tensor] = {}
        for layer in range(self.shape.text_layers):
            count = self.plan.prefill.get(layer, len(alive))
            if layer in self.plan.prefill and len(alive) and (count < len(alive) or self.method.adaptive):
                tokens = inside.before_layer(
                    self.method, self.layout, layer, alive, CONTENTS[self.content], self.seed, self.shape, self.notes
                )
                selection = self.method.prefill(tokens)
                self._answered("prefill", layer, tokens.hidden[tokens.visual], selection)
                alive = alive[selection.keep]
            there[layer] = alive
        return there

    def _evict(self, there: dict[int, Tensor]) -> None:
        wanted = [s for s in self.method.wants(self.shape) if s.tower == "text"]
        for layer, count in self.plan.cached.items():
            n = len(there[layer])
            if count >= n and not self.method.adaptive:
                continue
            keys, values = (self.vectors(KV_HEADS, n, inside.WIDTH) for _ in range(2))
            signals = {s: self._in_cache(s, n) for s in wanted if s.layer == layer or isinstance(s, AttentionSupport)}
            output = torch.randn(HEADS, 6, inside.WIDTH, generator=self.generator)
            tokens = CacheTokens(
                layer, keys, values, there[layer], count, 0, self.layout, self.shape, signals, self.notes, {}, output
            )
            self._answered("evict", layer, keys, self.method.evict(tokens))

    def _in_cache(self, signal: Signal, rows: int) -> Tensor:
        if isinstance(signal, AttentionSupport):
            return 1 + self.weights(HEADS)
        return self.weights(rows, 1) if isinstance(signal, SinkShare) else self.weights(HEADS, rows)


def _shaped(mask: Tensor, signal: Signal) -> Tensor:
    """``mask (tiles, patches)`` as the values of a vision signal are laid out."""
    if isinstance(signal, (Hidden, ModuleDelta)):
        return mask[..., None]
    return mask[:, None, :, None] if isinstance(signal, (Keys, Values)) else mask[:, None]
