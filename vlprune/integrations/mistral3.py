"""Mistral 3: Pixtral's encoder for images of any size, blocks of patches to one visual token by the patch merger.

A row of an image ends with a token of text in the prompt, so its placeholders come in runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.engine.family import Family, blocks, register
from vlprune.image import ImageLayout
from vlprune.integrations.layouts import TESTED, tiles_in_a_row


def layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    unit = _unit(model)
    return [tiles_in_a_row(1, (height // unit, width // unit)) for height, width in _sizes(arguments)]


def groups(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    config: Any = model.config
    return blocks(grid, config.spatial_merge_size)


def smaller(model: nn.Module, arguments: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
    """Each image resized in its own corner of the batch's frame."""
    unit, sizes = _unit(model), [(rows * _unit(model), columns * _unit(model)) for rows, columns in grids]
    pixels = arguments["pixel_values"]
    small = pixels.new_zeros(*pixels.shape[:2], max(height for height, _ in sizes), max(width for _, width in sizes))
    for index, ((height, width), size) in enumerate(zip(_sizes(arguments), sizes, strict=True)):
        image = pixels[index : index + 1, :, : height // unit * unit, : width // unit * unit].float()
        image = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
        small[index, :, : size[0], : size[1]] = image[0].to(pixels.dtype)
    given = arguments["image_sizes"]
    after: Any = torch.tensor(sizes, device=given.device) if torch.is_tensor(given) else sizes
    return {**arguments, "pixel_values": small, "image_sizes": after}


def _unit(model: nn.Module) -> int:
    """Pixels along a side of a visual token."""
    config: Any = model.config
    return config.vision_config.patch_size * config.spatial_merge_size


def _sizes(arguments: dict[str, Any]) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in torch.as_tensor(arguments["image_sizes"]).tolist()]


MISTRAL3 = register(
    Family(
        "Mistral 3",
        ("mistral3",),
        layouts,
        tested=TESTED,
        groups=groups,
        packed=True,
        smaller=smaller,
        vision_layers=("transformer.layers",),
        vision_attention="attention",
        vision_mlp="feed_forward",
        vision_types=("pixtral",),
        cls_types=(),
        pointwise=False,
    )
)
