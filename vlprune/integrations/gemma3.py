"""Gemma 3: SigLIP, blocks of patches averaged to 256 visual tokens, layers with sliding windows among those without.

Each crop of "pan and scan" is an image of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.engine.family import Family, blocks, register
from vlprune.image import ImageLayout
from vlprune.integrations.layouts import TESTED, tiles_in_a_row
from vlprune.integrations.llava import patches_per_side


def layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    side = _side(model)
    return [tiles_in_a_row(1, (side, side))] * arguments["pixel_values"].shape[0]


def groups(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    side = patches_per_side(model)
    return blocks(grid, side // _side(model), side)


def _side(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.mm_tokens_per_image**0.5)


GEMMA3 = register(
    Family(
        "Gemma 3",
        ("gemma3",),
        layouts,
        tested=TESTED,
        groups=groups,
        vision_types=("siglip_vision_model",),
        cls_types=(),
        pointwise=False,
        # The projector averages blocks of the full grid.
        resizable=False,
        sliding=True,
    )
)
