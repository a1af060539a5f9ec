"""LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video: a CLIP or SigLIP encoder, a projector, and any language model of the Llama kind."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.family import Family, blocks, register, single_patches
from vlprune.image import ImageLayout, centres, remembered
from vlprune.integrations.layouts import TESTED, tiles_in_a_row


def patches_per_side(model: nn.Module) -> int:
    """Rows, and columns, of patches in a tile of CLIP or SigLIP."""
    config: Any = model.config
    return config.vision_config.image_size // config.vision_config.patch_size


def pinpoints(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Heights and widths that a picture of tiles may have."""
    config: Any = model.config
    return tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)


def llava_layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    return [single(patches_per_side(model))] * arguments["pixel_values"].shape[0]


def llava_next_layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    config: Any = model.config
    side, tile, allowed = patches_per_side(model), config.vision_config.image_size, pinpoints(model)
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    return [anyres(height, width, side, tile, allowed) for height, width in sizes]


def next_video_layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    """Each frame is pooled to fewer tokens."""
    config: Any = model.config
    videos, frames = frames_of(arguments)
    side = patches_per_side(model) // config.spatial_pool_stride
    return [tiles_in_a_row(frames, (side, side), video=True)] * videos


def frames_of(arguments: dict[str, Any]) -> tuple[int, int]:
    """Videos, and frames of each. The argument has another name before transformers 5."""
    pixels = arguments["pixel_values_videos" if "pixel_values_videos" in arguments else "pixel_values"]
    return int(pixels.shape[0]), int(pixels.shape[1])


def next_video_groups(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    config: Any = model.config
    side = patches_per_side(model)
    return single_patches(model, grid) if grid[0] == side else blocks(grid, config.spatial_pool_stride, side)


@remembered
def single(side: int) -> ImageLayout:
    indices = torch.arange(side * side)
    return ImageLayout(
        total=side * side,
        placeholder=indices[None],
        grid=(side, side),
        thumbnail=True,
        crops=(0, 0),
        regions=(indices.view(side, side),),
    )


@remembered
def anyres(
    height: int, width: int, side: int, tile: int, pinpoints: tuple[tuple[int, int], ...], most: int | None = None
) -> ImageLayout:
    """Thumbnail first, then the crops as one picture without its padding, a row end behind each of its rows.

    ``most``: of how many tiles' size the picture may be. A larger one is resized, so a token is a mixture of patches; it
    belongs to the patch that its centre falls on, and the patches between have no token.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    crops = get_anyres_image_grid_shape((height, width), [list(p) for p in pinpoints], tile)
    patches = side * side
    indices = torch.arange(patches * crops[0] * crops[1]).view(*crops, side, side)
    stitched = indices.permute(0, 2, 1, 3).reshape(crops[0] * side, crops[1] * side)
    picture: Tensor = unpad_image(stitched[None], (height, width))[0]
    rows, columns = picture.shape
    ratio = math.sqrt(rows * columns / (most * side**2)) if most else 1.0
    if ratio > 1.1:
        smaller = int(rows // ratio), int(columns // ratio)
        picture = picture.flatten()[centres((rows, columns), smaller)].view(smaller)
        rows, columns = smaller
    region = patches + torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)
    crop_places = torch.full((patches * crops[0] * crops[1],), -1)
    crop_places[picture.flatten()] = region.flatten()
    thumbnail = torch.arange(patches)
    return ImageLayout(
        total=patches + rows * (columns + 1),
        placeholder=torch.cat([thumbnail, crop_places]).view(-1, patches),
        grid=(side, side),
        thumbnail=True,
        crops=(int(crops[0]), int(crops[1])),
        regions=(thumbnail.view(side, side), region),
    )


LLAVA = register(Family("LLaVA", ("llava",), llava_layouts, tested=TESTED))
LLAVA_NEXT = register(Family("LLaVA-NeXT", ("llava_next",), llava_next_layouts, tested=TESTED))
LLAVA_NEXT_VIDEO = register(
    Family(
        "LLaVA-NeXT-Video",
        ("llava_next_video",),
        llava_next_layouts,
        tested=TESTED,
        video_layouts=next_video_layouts,
        groups=next_video_groups,
        pointwise=False,
        # Frames are pooled on their full grid, before the projector.
        resizable=False,
    )
)
