"""Idefics3 and SmolVLM: square tiles through SigLIP, blocks of patches to one visual token by pixel shuffle.

All tiles of a sample count as one image, that of a video's frames too: the model gets a sample's tiles in one list and is not
told which of them belong together, nor where they lie. A budget of tokens is for that list. Text between the tiles, which
tells the LLM their rows and columns, is text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.engine.family import Family, blocks, register
from vlprune.image import ImageLayout
from vlprune.integrations.layouts import TESTED, tiles_in_a_row


def layouts(model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
    """One layout for each sample that has a tile. Tiles that are blank fill up shorter lists; the model drops them."""
    config: Any = model.config
    pixels = arguments["pixel_values"]
    side = pixels.shape[-1] // config.vision_config.patch_size // config.scale_factor
    tiles = (pixels != 0).flatten(2).any(-1).sum(1).tolist()
    if config.model_type == "smolvlm" and not any(tiles):
        tiles[0] = 1
    return [tiles_in_a_row(count, (side, side)) for count in tiles if count]


def groups(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    config: Any = model.config
    return blocks(grid, config.scale_factor)


def _family(name: str, model_type: str) -> Family:
    return register(
        Family(
            name,
            (model_type,),
            layouts,
            tested=TESTED,
            groups=groups,
            text="model.text_model",
            text_layers="model.text_model.layers",
            vision="model.vision_model",
            vision_layers=("encoder.layers",),
            vision_types=(f"{model_type}_vision",),
            cls_types=(),
            pointwise=False,
            projector="model.connector",
            # Pixel shuffle wants a square, and masks of the full tile's patches come along.
            resizable=False,
        )
    )


IDEFICS3 = _family("Idefics3", "idefics3")
SMOLVLM = _family("SmolVLM", "smolvlm")
