"""InternVL 2.5 and later: a ViT with [CLS], 2 x 2 patches to one visual token by pixel shuffle.

Each tile counts as an image of its own, the thumbnail too: the model gets all tiles of a batch one behind the other and is not
told which of them belong together. The frames of a video are such tiles.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.engine.family import Family, blocks, register
from vlprune.image import ImageLayout
from vlprune.integrations.layouts import TESTED, tiles_in_a_row


def layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    config: Any = model.config
    pixels, patch = arguments["pixel_values"], config.vision_config.patch_size
    side = int(pixels.shape[-1] // patch[1] * config.downsample_ratio)
    return [tiles_in_a_row(1, (side, side))] * pixels.shape[0]


def groups(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    config: Any = model.config
    return blocks(grid, round(1 / config.downsample_ratio))


INTERNVL = register(
    Family(
        "InternVL",
        ("internvl",),
        layouts,
        tested=TESTED,
        groups=groups,
        vision_layers=("encoder.layer",),
        vision_attention="attention",
        vision_types=("internvl_vision",),
        cls_types=("internvl_vision",),
        pointwise=False,
        # Pixel shuffle wants an even square.
        resizable=False,
    )
)
