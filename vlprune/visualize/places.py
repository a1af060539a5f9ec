"""Where the tokens of an image lie on its picture, in pixels: what a processor crops, pads and tiles, in reverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlprune.image import ImageLayout
from vlprune.report import ImageReport

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture."""

CROPPING = ("llava", "llava_next_video")
"""Model types whose usual processor scales the shorter side (of frames, for the second) and cuts out the middle square."""
TILED_LAST = ("idefics3", "smolvlm")
"""Those whose tiles in raster order are followed by one that shows the whole image."""
TILE = 336
"""Pixels of a tile's side where no processor tells: those of CLIP's larger encoder."""


@dataclass(frozen=True, eq=False)
class View:
    """A rectangle of tokens on a picture.

    ``tokens (rows, columns)``: their indices in the run of placeholders of image number ``image`` of the report. ``box``: what
    they cover, with padding more than the picture itself. ``frame``: of which frame. ``name``: what a reader calls it.
    """

    tokens: Tensor
    box: Box
    frame: int = 0
    image: int = 0
    name: str = ""

    def cells(self) -> list[tuple[int, int, int, Box]]:
        """Row, column, token and box of each token."""
        (rows, columns), (left, top, right, bottom) = self.tokens.shape, self.box
        wide, high = (right - left) / columns, (bottom - top) / rows
        return [
            (r, c, int(token), (left + c * wide, top + r * high, left + (c + 1) * wide, top + (r + 1) * high))
            for r, row in enumerate(self.tokens.tolist())
            for c, token in enumerate(row)
        ]


@dataclass(frozen=True)
class Geometry:
    """What a processor does to an image before it is cut into patches.

    ``crop``: the part of the shorter side that the middle square keeps, None where the image is stretched. ``square``: a
    single tile is the image padded to a square. ``tile``: pixels of a tile's side.
    """

    model_type: str = ""
    crop: float | None = None
    square: bool = False
    tile: int = TILE

    @classmethod
    def of(cls, model_type: str, processor: Any = None, video: bool = False) -> Geometry:
        """By the image processor (or the video processor) in ``processor``, else as is usual for the model type."""
        usual = model_type in CROPPING and (video or model_type == "llava")
        used = getattr(processor, "video_processor" if video else "image_processor", processor)
        size = _as_dict(getattr(used, "size", None))
        square = model_type == "llava_onevision" and not video
        if not size:
            return cls(model_type, 1.0 if usual else None, square)
        square = square or (model_type == "llava" and bool(getattr(used, "do_pad", False)))
        short = size.get("shortest_edge") or size.get("height") or TILE
        cut = _as_dict(getattr(used, "crop_size", None)).get("height", short)
        crops = model_type in CROPPING and bool(getattr(used, "do_center_crop", False)) and "shortest_edge" in size
        tile = short if "height" in size else cut
        return cls(model_type, cut / short if crops and not square else None, square, int(tile))


def _as_dict(size: Any) -> dict[str, int]:
    return {name: value for name, value in dict(size).items() if value is not None} if size else {}


def views(images: Sequence[ImageReport], size: tuple[int, int], geometry: Geometry, frames: int = 1) -> list[View]:
    """The rectangles of tokens of one picture, width and height ``size``, or of a video's ``frames``.

    ``images``: what the report says of it; several where the model takes each tile for an image.
    """
    if len(images) > 1:
        return _tiled([image.layout for image in images], size)
    (image,) = images
    layout = _layout(image)
    if image.video:
        return [
            View(layout.regions[frame * layout.tiles // frames], _box(size, geometry), frame, name=f"frame {frame + 1}")
            for frame in range(frames)
        ]
    if layout.crops != (0, 0):
        crops = stitched(size, layout, geometry.tile)
        return [View(layout.regions[0], (0, 0, *size), name="thumbnail"), View(layout.regions[1], crops, name="crops")]
    if layout.tiles == 1:
        return [View(layout.regions[0], _box(size, geometry))]
    if geometry.model_type in TILED_LAST:
        return _grid(list(layout.regions), size, [0] * layout.tiles)
    return [View(region, _box(size, geometry), name=f"tile {n + 1}") for n, region in enumerate(layout.regions)]


def _layout(image: ImageReport) -> ImageLayout:
    if image.layout is None:
        raise ValueError("this report was read from JSON, which has no layout of the image; draw the report of a run itself")
    return image.layout


def _box(size: tuple[int, int], geometry: Geometry) -> Box:
    """What a single tile covers of a picture of ``size``."""
    width, height = size
    if geometry.square:
        side = max(size)
        left, top = (side - width) // 2, (side - height) // 2
        return -left, -top, side - left, side - top
    if geometry.crop is None:
        return 0, 0, width, height
    side = min(size) * geometry.crop
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def stitched(size: tuple[int, int], layout: ImageLayout, tile: int) -> Box:
    """What the crops' tokens cover once the model has cut off the padding, which it does by whole patches.

    The picture was scaled to fit into the tiles and put in their middle, as LLaVA-NeXT's processor does.
    """
    width, height = size
    side, (down, right) = layout.grid[0], layout.crops
    canvas = right * tile, down * tile
    if canvas[0] / width < canvas[1] / height:
        inner = canvas[0], min(math.ceil(height * canvas[0] / width), canvas[1])
    else:
        inner = min(math.ceil(width * canvas[1] / height), canvas[0]), canvas[1]
    rows, columns = down * side, right * side
    # How many patches of padding the model cuts off.
    over, beside = 0, 0
    if width / height > columns / rows:
        over = (rows - int(round(height * columns / width, 7))) // 2
    else:
        beside = (columns - int(round(width * rows / height, 7))) // 2
    patch, scale = tile / side, (width / inner[0], height / inner[1])
    pasted = (canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2
    return (
        (beside * patch - pasted[0]) * scale[0],
        (over * patch - pasted[1]) * scale[1],
        ((columns - beside) * patch - pasted[0]) * scale[0],
        ((rows - over) * patch - pasted[1]) * scale[1],
    )


def _tiled(layouts: Sequence[ImageLayout | None], size: tuple[int, int]) -> list[View]:
    """Tiles that the model takes for images of their own: those of a grid, and behind them one that shows all."""
    regions = [layout.regions[0] for layout in layouts if layout is not None]
    return _grid(regions, size, list(range(len(regions))))


def _grid(regions: list[Tensor], size: tuple[int, int], images: list[int]) -> list[View]:
    """Tiles of a grid in raster order, of the shape that is nearest to the picture's, and the whole picture as the last."""
    width, height = size
    count = len(regions) - 1
    shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    rows, columns = min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] * height / width)))
    found = []
    for number, region in enumerate(regions[:-1]):
        row, column = divmod(number, columns)
        box = (width * column / columns, height * row / rows, width * (column + 1) / columns, height * (row + 1) / rows)
        found.append(View(region, box, image=images[number], name="crops"))
    return [View(regions[-1], (0, 0, width, height), image=images[-1], name="thumbnail"), *found]
