"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size in one row of patches, each 2 x 2 of them one visual token.

A video is one image whose tiles are its frames (pairs of frames, as the encoder takes them).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.engine.family import Family, register
from vlprune.image import ImageLayout
from vlprune.integrations.layouts import TESTED, tiles_in_a_row


def layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    merge = _merge(model)
    return [
        tiles_in_a_row(frames, (rows // merge, columns // merge), video=frames > 1)
        for frames, rows, columns in _grids(arguments).tolist()
    ]


def groups(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    """The processor puts the patches of a token one behind the other."""
    each = _merge(model) ** 2
    return torch.arange(grid[0] * grid[1] * each).view(-1, each)


def windows(model: Any, arguments: dict[str, Any]) -> Tensor:
    """The order of Qwen2.5-VL's tokens inside of its blocks, window by window."""
    vision, grids = model.model.visual, _grids(arguments)
    if hasattr(vision, "get_window_index"):  # transformers before 5
        return vision.get_window_index(grids)[0]
    from transformers.vision_utils import get_vision_window_index

    config = vision.config
    return get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)[0]


def smaller(model: nn.Module, arguments: dict[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
    """Rows of pixels put together to images, resized, and taken apart again."""
    name = "pixel_values_videos" if "pixel_values_videos" in arguments else "pixel_values"
    pixels, before = arguments[name], _grids(arguments)
    merge, rows, after, first = _merge(model), [], before.clone(), 0
    for index, ((frames, height, width), grid) in enumerate(zip(before.tolist(), grids, strict=True)):
        image = pixels[first : first + frames * height * width]
        first += image.shape[0]
        size = grid[0] * merge, grid[1] * merge
        rows.append(_resized(model, image, (height, width), size) if size != (height, width) else image)
        after[index, 1], after[index, 2] = size
    return {**arguments, name: torch.cat(rows), _grid_name(arguments): after}


def _resized(model: Any, rows: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """``rows (frames * patches, pixels of a patch)`` of an image of ``before`` patches, at ``after`` patches."""
    config = model.config.vision_config
    merge, patch, time = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    height, width = before
    blocks = rows.view(
        -1, height // merge, width // merge, merge, merge, rows.shape[1] // (time * patch**2), time, patch, patch
    )
    # frames, time, channels, then (rows of blocks, of patches, of pixels) and the same of columns
    image = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    frames, channels = image.shape[0], image.shape[2]
    image = image.reshape(frames * time, channels, height * patch, width * patch)
    size = after[0] * patch, after[1] * patch
    image = F.interpolate(image.float(), size, mode="bicubic", antialias=True, align_corners=False).to(rows.dtype)
    image = image.view(frames, time, channels, after[0] // merge, merge, patch, after[1] // merge, merge, patch)
    return image.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, rows.shape[1])


def _merge(model: nn.Module) -> int:
    config: Any = model.config
    return config.vision_config.spatial_merge_size


def _grid_name(arguments: dict[str, Any]) -> str:
    return "video_grid_thw" if arguments.get("video_grid_thw") is not None else "image_grid_thw"


def _grids(arguments: dict[str, Any]) -> Tensor:
    """Frames, rows and columns of patches of each image or video ``(images, 3)``."""
    return arguments[_grid_name(arguments)]


def _family(name: str, model_type: str, vision_types: tuple[str, ...], order: Any = None) -> Family:
    return register(
        Family(
            name,
            (model_type,),
            layouts,
            tested=TESTED,
            video_layouts=layouts,
            groups=groups,
            packed=True,
            order=order,
            smaller=smaller,
            vision="model.visual",
            vision_layers=("blocks",),
            vision_attention="attn",
            vision_types=vision_types,
            cls_types=(),
            projector="model.visual.merger",
        )
    )


# The encoder's config has the model's own type before transformers 5.
QWEN2_VL = _family("Qwen2-VL", "qwen2_vl", ("qwen2_vl", "qwen2_vl_vision"))
QWEN25_VL = _family("Qwen2.5-VL", "qwen2_5_vl", ("qwen2_5_vl", "qwen2_5_vl_vision"), order=windows)
QWEN3_VL = _family("Qwen3-VL", "qwen3_vl", ("qwen3_vl", "qwen3_vl_vision"))
