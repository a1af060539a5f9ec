"""Methods that drop visual tokens before several layers of the LLM: where, and how many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlprune import budget as budgets
from vlprune import options
from vlprune.errors import OptionError
from vlprune.image import ImageLayout, LayerTokens, ModelShape, top
from vlprune.knobs import Draw, ascending, falling
from vlprune.method import Method, Plan, Selection
from vlprune.signals import QueryAttention

LAST, TEXT = QueryAttention(queries="last", mean_heads=True), QueryAttention(queries="text", mean_heads=True)


def scaled(layers: Sequence[int], of: int, depth: int) -> list[int]:
    """``layers`` of an LLM of ``of`` layers, for one of ``depth``: none before layer 1; several may become one."""
    return [min(max(1, round(layer * depth / of)), depth - 1) for layer in layers]


def staged_plan(entering: int, counts: Mapping[int, int]) -> Plan:
    """Of ``entering`` tokens so many from each LLM layer on, in the order of layers; where none leaves, nobody is asked."""
    stages = zip(counts.items(), [entering, *counts.values()], strict=False)
    return Plan(entering, {start: now for (start, now), before in stages if now < before})


@dataclass(kw_only=True)
class StagedMethod(Method):
    """A method that drops before several LLM layers, all tokens before the first of them, by a published schedule.

    ``layers``: LLM layers before which tokens leave, ascending, at least 1. None: the published ones, scaled to the model.
    ``keep``: tokens of an image (int), or fractions of them (float), from each of ``layers`` on, none above the one before;
    ``budget`` does not count then. None: the published ratios, all raised to the power at which the mean over the LLM's
    layers is the budget.
    ``split``: shares in place of the published ratios, one for each of ``layers``, none above the one before. What counts
    is how they fall, since they are raised to a power, too.
    """

    published: ClassVar[dict[int, float]]
    """Layer -> tokens from it on, as a share of all."""
    depth: ClassVar[int] = 32
    """Layers of the LLM that ``published`` is for."""

    budget: int | float = 0.5
    layers: Sequence[int] | None = None
    keep: Sequence[int | float] | None = None
    split: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            self.layers = options.ascending_layers("layers", self.layers, first=1)
        if self.keep is not None:
            self.keep = tuple(map(budgets.check, self.keep))
            stages = len(self.layers or self.published)
            if len(self.keep) != stages:
                raise OptionError(f"keep={self.keep!r}: {stages} numbers are wanted, one for each of the layers")
        if self.split is not None:
            self.split = tuple(self.split)
            self._check_split(self.split, len(self.layers or self.published))

    def _check_split(self, split: Sequence[float], stages: int) -> None:
        fall = list(split) == sorted(split, reverse=True) and all(0.0 < share <= 1.0 for share in split)
        if len(split) != stages or not fall:
            raise OptionError(
                f"split={split!r}: {stages} shares in (0, 1] are wanted, one for each layer, none above the last"
            )
        if self.keep is not None:
            raise OptionError(
                f"keep={self.keep!r}, split={split!r}: keep says how many tokens stay, so there is nothing to split"
            )

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        stages = min(len(cls.published), shape.text_layers - 1)
        return {
            "layers": ascending(draw, "layers", stages, 1, shape.text_layers - 1),
            "split": falling(draw, "split", stages),
        }

    def starts(self, depth: int) -> list[int]:
        """``layers`` of an LLM of ``depth`` layers."""
        if self.layers is None:
            return scaled(list(self.published), self.depth, depth)
        return list(options.in_model("layers", self.layers, depth))

    def plan(self, layout: ImageLayout, shape: ModelShape) -> Plan:
        total = layout.total
        counts = self._given(total, shape) if self.keep is not None else self._solved(total, shape)
        return staged_plan(total, counts)

    def _given(self, total: int, shape: ModelShape) -> dict[int, int]:
        """``keep`` in tokens. Where layers become one, the last one counts."""
        assert self.keep is not None
        counts = [budgets.tokens(keep, total) for keep in self.keep]
        if counts != sorted(counts, reverse=True):
            raise OptionError(f"keep={self.keep!r} of {total} tokens is {counts}: what has left does not come back")
        return dict(zip(self.starts(shape.text_layers), counts, strict=True))

    def _solved(self, total: int, shape: ModelShape) -> dict[int, int]:
        depth = shape.text_layers
        exponents = dict(zip(self.starts(depth), self._exponents(), strict=True))
        lengths = budgets.lengths(list(exponents), depth)
        room, least = budgets.room(self.budget, total, depth), budgets.stepped(total, 1, lengths[0], depth)
        if room < least:
            raise budgets.unreachable(self.name, self.budget, total, least / depth)
        counts = budgets.shaped(total, 1, list(exponents.values()), lengths, room)
        return dict(zip(exponents, counts[1:], strict=True))

    def _exponents(self) -> list[float]:
        """Of ``layers``: those of the ratios; equal factors where there are more or fewer layers than published."""
        ratios = list(self.published.values()) if self.split is None else self.split
        if self.split is None and self.layers is not None and len(self.layers) != len(ratios):
            return list(range(1, len(self.layers) + 1))
        return [-math.log2(ratio) for ratio in ratios]


def best(tokens: LayerTokens, scores: Tensor) -> Selection:
    """Keeps the visual tokens with the highest ``scores (N,)``."""
    return Selection(top(scores, tokens.count).sort().values)


def attention_of_text(tokens: LayerTokens) -> Tensor:
    """What text behind the image pays each of its tokens ``(N,)`` in the layer before, on average; needs ``TEXT``."""
    behind = (tokens.text > tokens.visual[-1]).float()
    return behind @ tokens[TEXT][0] / behind.sum().clamp(min=1)
