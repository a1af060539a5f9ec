"""Baselines for vision transformers on their own that look at nothing: rows at random, and rows at even distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.method import register
from vlprune.methods.assigning import numbered, staying


@dataclass(kw_only=True)
class _Dropping(BlockMethod):
    """Drops rows of the same places in every image, as many in each block as ToMe merges."""

    budget: int | float = 0.5
    proportional: bool = False

    @property
    def drops(self) -> bool:
        return True

    def places(self, tokens: BlockTokens, rows: int) -> Tensor:
        """Which of ``rows`` unprotected ones leave, ``(tokens.leaving,)``."""
        raise NotImplementedError

    def reduce(self, tokens: BlockTokens) -> Tensor:
        into = staying(tokens.hidden)
        places = self.places(tokens, into.shape[1] - tokens.prefix).to(into.device) + tokens.prefix
        return numbered(into.index_fill(1, places, -1))


@register("random-patches")
@dataclass(kw_only=True)
class RandomPatches(_Dropping):
    """Rows at random: a draw by ``seed``, the block and how many there are, the same for all images."""

    seed: int = 0

    def places(self, tokens: BlockTokens, rows: int) -> Tensor:
        return _draw(self.seed + 1000 * tokens.block, rows)[: tokens.leaving]


@register("uniform-patches")
@dataclass(kw_only=True)
class UniformPatches(_Dropping):
    """Rows at even distances, in the order in which they stand."""

    def places(self, tokens: BlockTokens, rows: int) -> Tensor:
        return ((2 * torch.arange(tokens.leaving) + 1) * rows).div(2 * max(1, tokens.leaving), rounding_mode="floor")


def _draw(seed: int, rows: int) -> Tensor:
    """``rows`` in an order that has none: by a hash of each index and ``seed``, which can be compiled; a generator cannot."""
    mixed = torch.arange(rows) + (0x9E3779B1 * (seed + 1) & 0xFFFFFFFF)
    for factor in (0x45D9F3B, 0x119DE1F3, 1):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    return mixed.argsort(stable=True)
