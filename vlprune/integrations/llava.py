"""LLaVA and LLaVA-NeXT: a CLIP or SigLIP encoder, a projector, and any language model of the Llama kind."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.family import Family, register
from vlprune.image import ImageLayout


def llava_layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [_single(side)] * arguments["pixel_values"].shape[0]


def llava_next_layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    return [_anyres(height, width, side, config.vision_config.image_size, pinpoints) for height, width in sizes]


@lru_cache(maxsize=16)
def _single(side: int) -> ImageLayout:
    indices = torch.arange(side * side)
    return ImageLayout(
        total=side * side,
        placeholder=indices[None],
        grid=(side, side),
        thumbnail=True,
        crops=(0, 0),
        regions=(indices.view(side, side),),
    )


@lru_cache(maxsize=256)
def _anyres(height: int, width: int, side: int, tile: int, pinpoints: tuple[tuple[int, int], ...]) -> ImageLayout:
    """Thumbnail first, then the crops as one picture without its padding, a row end behind each of its rows."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    crops = get_anyres_image_grid_shape((height, width), [list(p) for p in pinpoints], tile)
    patches = side * side
    indices = torch.arange(patches * crops[0] * crops[1]).view(*crops, side, side)
    stitched = indices.permute(0, 2, 1, 3).reshape(crops[0] * side, crops[1] * side)
    picture: Tensor = unpad_image(stitched[None], (height, width))[0]
    rows, columns = picture.shape
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


LLAVA = register(Family("LLaVA", ("llava",), llava_layouts))
LLAVA_NEXT = register(Family("LLaVA-NeXT", ("llava_next",), llava_next_layouts))
