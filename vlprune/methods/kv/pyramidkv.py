"""PyramidKV: lower layers of the LLM keep more of the cache than higher ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from vlprune import budget as budgets
from vlprune.errors import OptionError
from vlprune.method import register
from vlprune.methods.kv.snapkv import SnapKV


@register("pyramidkv")
@dataclass(kw_only=True)
class PyramidKV(SnapKV):
    """PyramidKV: SnapKV's choice, with counts that fall linearly from the first layer of the LLM to the last.

    The last layer keeps 1 / ``steepness`` of the mean, the first one as much more as that is less. Where the image has not so
    many tokens, the first layer keeps all of them, and the last one more. The sum over the layers is the budget, exactly.

    ``window``, ``kernel``: SnapKV's. ``steepness``: how much less than the mean the last layer keeps.

    Deviations from the official code: only visual tokens are evicted; the window's own entries are text and no part of the
    budget; counts are rounded by largest remainders, so that none is lost.
    """

    paper: ClassVar[str] = "Cai et al., PyramidKV, arXiv:2406.02069"

    steepness: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steepness < 1:
            raise OptionError(f"steepness={self.steepness!r}: allowed is a number from 1 on")

    def counts(self, total: int, layers: int) -> Sequence[int]:
        return pyramid(self.count(total), total, layers, self.steepness)


@lru_cache(maxsize=512)
def pyramid(mean: int, total: int, layers: int, steepness: float) -> list[int]:
    """``mean`` entries a layer on average, falling linearly to ``mean / steepness`` or what ``total`` makes of it."""
    low = max(mean / steepness, 2 * mean - total)
    high = 2 * mean - low
    steps = max(layers - 1, 1)
    weights = [high + (low - high) * layer / steps for layer in range(layers)]
    return budgets.over_layers(mean, weights if layers > 1 else [1.0], total)
