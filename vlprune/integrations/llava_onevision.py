"""LLaVA-OneVision: SigLIP, tiles for an image that is alone in its prompt, pooled frames for a video.

Of an image that is alone, thumbnail and crops are as in LLaVA-NeXT. Several images in a prompt have one tile each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.family import Family, register, single_patches
from vlprune.image import ImageLayout, centres
from vlprune.integrations.layouts import TESTED, tiles_in_a_row
from vlprune.integrations.llava import anyres, frames_of, patches_per_side, pinpoints


def layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    config: Any = model.config
    side, tile, allowed = patches_per_side(model), config.vision_config.image_size, pinpoints(model)
    most = int((arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    numbers = arguments.get("batch_num_images")
    alone = [True] * len(sizes)
    if numbers is not None:
        alone = [number == 1 for number in torch.as_tensor(numbers).tolist() for _ in range(number)]
    return [
        anyres(height, width, side, tile, allowed, most) if tiled else tiles_in_a_row(1, (side, side), separators=1)
        for (height, width), tiled in zip(sizes, alone, strict=True)
    ]


def video_layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    """Frames at half of the tile's sides, and a newline behind the last one."""
    side = -(-patches_per_side(model) // 2)
    videos, frames = frames_of(arguments)
    return [tiles_in_a_row(frames, (side, side), separators=1, video=True)] * videos


def groups(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    """Pooling of frames interpolates between patches; a token is taken for the patch that its centre falls on."""
    side = patches_per_side(model)
    return single_patches(model, grid) if grid[0] == side else centres((side, side), grid)[:, None]


def newline(model: Any) -> Tensor:
    return model.model.image_newline[None]


LLAVA_ONEVISION = register(
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        layouts,
        tested=TESTED,
        video_layouts=video_layouts,
        groups=groups,
        tail=newline,
        vision_types=("siglip_vision_model",),
        cls_types=(),
        # For the same reason as below: resizing mixes what is left with what is not.
        stages=("select", "prefill", "evict"),
        # Pictures and frames are resized as features, which would mix those of a smaller image with the gaps between them.
        resizable=False,
    )
)
