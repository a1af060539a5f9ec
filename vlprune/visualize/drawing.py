"""How tokens are drawn: shades, colours, outlines, and sheets of captioned panels."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlprune.visualize.places import Box, View

DARKNESS = 215
"""How black (of 255) a token is that no layer kept."""
KEPT, THUMBNAIL = (0, 200, 170), (255, 176, 32)
"""Outlines of tokens that are left, and of those of a thumbnail, which show the same part of the picture once more."""
INK, PAPER, QUIET = (26, 26, 26), (255, 255, 255), (95, 99, 104)
COARSE = 0.5
"""How bright a patch is that only the thumbnail has kept, next to crops."""
GAP, LINE = 12, 20
"""Pixels between panels, and of a line of text."""
HEAT = ((13, 8, 65), (106, 0, 138), (190, 48, 107), (238, 121, 64), (252, 216, 92))
"""From cold to hot; its lightness rises evenly, so that it is read without colour vision, too."""


def shade(share: np.ndarray) -> Image.Image:
    """Black ``(rows, columns)``, as opaque as tokens are missing; ``share``: of the layers that kept each, 0 to 1."""
    opaque = np.rint(DARKNESS * (1 - share)).astype(np.uint8)
    return Image.fromarray(np.dstack([np.zeros_like(opaque), opaque]))


def pixels(box: Box) -> tuple[int, int, int, int]:
    """Whole pixels of a box; neighbours share no pixel and leave none out."""
    left, top, right, bottom = (round(edge) for edge in box)
    return left, top, right, bottom


def scaled(view: View, scale: float) -> View:
    left, top, right, bottom = view.box
    box = (left * scale, top * scale, right * scale, bottom * scale)
    return View(view.tokens, box, view.frame, view.image, view.name)


def enlarged(picture: Image.Image, side: int | None) -> tuple[Image.Image, float]:
    """The picture with a longer side of ``side`` pixels, RGB, and by how much it grew; None leaves its size."""
    picture = picture.convert("RGB")
    if side is None or side == max(picture.size):
        return picture, 1.0
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS if scale < 4 else Image.Resampling.NEAREST), scale


Shares = Mapping[int, np.ndarray]
"""Image of the report -> what each of its tokens ``(total,)`` is drawn by."""


def kept(picture: Image.Image, views: Sequence[View], shares: Shares, outlines: bool = True) -> Image.Image:
    """The picture, dark where tokens are missing; half dark where of two views, thumbnail and crops, the thumbnail has one."""
    present = np.zeros((picture.height, picture.width), dtype=np.float32)
    coarse = COARSE if any(view.name == "crops" for view in views) else 1.0
    for view in views:
        weight = coarse if view.name == "thumbnail" else 1.0
        for _, _, token, box in view.cells():
            left, top, right, bottom = (max(0, edge) for edge in pixels(box))
            part = present[top:bottom, left:right]
            np.maximum(part, weight * shares[view.image][token], out=part)
    drawn = picture.copy()
    dark = shade(present)
    drawn.paste(dark.getchannel(0), mask=dark.getchannel(1))
    if outlines:
        _outline(drawn, views, shares)
    return drawn


def _outline(drawn: Image.Image, views: Sequence[View], shares: Shares) -> None:
    """Lines around areas of tokens that are left, not around each token: the border of a region is what one wants to see."""
    draw = ImageDraw.Draw(drawn)
    for view in sorted(views, key=lambda view: view.name != "thumbnail"):
        there = shares[view.image][view.tokens.numpy()] > 0
        for row, column, _, box in view.cells():
            if there[row, column]:
                left, top, right, bottom = pixels(box)
                colour = THUMBNAIL if view.name == "thumbnail" and len(views) > 1 else KEPT
                for line in _borders(there, row, column, (left, top, right - 1, bottom - 1)):
                    draw.line(line, fill=colour, width=2 if max(drawn.size) > 300 else 1)


def _borders(there: np.ndarray, row: int, column: int, box: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    left, top, right, bottom = box
    edges = {
        (-1, 0): (left, top, right, top),
        (1, 0): (left, bottom, right, bottom),
        (0, -1): (left, top, left, bottom),
        (0, 1): (right, top, right, bottom),
    }
    padded = np.pad(there, 1)
    return [line for (down, right_), line in edges.items() if not padded[row + 1 + down, column + 1 + right_]]


def tinted(picture: Image.Image, views: Sequence[View], colour: Callable[[View, int], Any], strength: float) -> Image.Image:
    """The picture with each token tinted; ``colour(view, token)`` gives RGB, or None for a dark one."""
    layer = Image.new("RGBA", picture.size, (0, 0, 0, DARKNESS))
    draw = ImageDraw.Draw(layer)
    for view in views:
        for _, _, token, box in view.cells():
            found = colour(view, token)
            if found is not None:
                left, top, right, bottom = pixels(box)
                draw.rectangle((left, top, right - 1, bottom - 1), fill=(*found, round(255 * strength)))
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def hues(number: int) -> tuple[int, int, int]:
    """Colours of groups: those of neighbouring numbers lie far apart, by the golden ratio."""
    red, green, blue = colorsys.hls_to_rgb((number * 0.618034) % 1, 0.5 if number % 2 else 0.62, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def heat(value: float) -> tuple[int, int, int]:
    """The colour of a value from 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(HEAT) - 1)
    low = min(int(place), len(HEAT) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(HEAT[low], HEAT[low + 1], strict=True)]
    return mixed[0], mixed[1], mixed[2]


# ------------------------------------------------------------------ sheets


@lru_cache
def font(size: int = 15) -> Any:
    return ImageFont.load_default(size)


def sheet(
    panels: Sequence[tuple[str, Image.Image]], across: int | None = None, legend: Sequence[Any] = (), title: str = ""
) -> Image.Image:
    """Panels of one size with a caption (lines of text) under each, ``across`` in a row, and a legend of colours below."""
    across = across or min(4, len(panels))
    width, height = panels[0][1].size
    lines = max(caption.count("\n") + 1 for caption, _ in panels)
    width = max(width, *(int(font().getlength(line)) for caption, _ in panels for line in caption.split("\n")), 0)
    step = height + 6 + LINE * lines + GAP
    rows = -(-len(panels) // across)
    head = LINE + GAP if title else 0
    foot = LINE + GAP if legend else 0
    made = Image.new("RGB", (GAP + across * (width + GAP), head + GAP + rows * step + foot), PAPER)
    draw = ImageDraw.Draw(made)
    draw.text((GAP, GAP), title, font=font(18), fill=INK)
    for number, (caption, panel) in enumerate(panels):
        left, top = GAP + number % across * (width + GAP), head + GAP + number // across * step
        made.paste(panel, (left, top))
        draw.multiline_text((left, top + height + 6), caption, font=font(), fill=INK, spacing=4)
    left = GAP
    for colour, text in legend:
        top = made.height - LINE - GAP // 2
        draw.rectangle((left, top + 2, left + 14, top + 15), fill=colour, outline=QUIET)
        draw.text((left + 20, top), text, font=font(), fill=QUIET)
        left += 20 + int(font().getlength(text)) + 24
    return made
