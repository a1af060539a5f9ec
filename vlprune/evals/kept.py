"""Which visual tokens of an image were kept, in a few characters of a row, and where they lie in the picture.

A token has a level from 0 to 15: the share of the LLM's layers (and of their heads, where a method evicts by head) whose
cache holds it once the prompt has been read. Where a method chooses before the LLM there are two levels only.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import vlprune
from vlprune.image import ImageLayout
from vlprune.report import ImageReport
from vlprune.visualize.show import share

TOP = 15
"""The level of a token that all layers have."""

Kept = dict[str, Any]
"""``total`` tokens, their ``levels`` as text, and the ``regions`` of the picture that they show, see :func:`kept_of`."""


def kept_of(report: vlprune.Report, layouts: Sequence[ImageLayout], text_layers: int) -> list[Kept]:
    """What a row says of each image of the last forward.

    A region is ``[first, stride, rows, columns]``: the token of row r and column c is ``first + stride * r + c``. The
    first region of a model with crops is its thumbnail; each region shows the whole picture, unless there are more than two.
    """
    return [
        {"total": image.total, "levels": pack(levels(image, text_layers)), "regions": regions(layout)}
        for image, layout in zip(report.images, layouts, strict=True)
    ]


def levels(image: ImageReport, text_layers: int) -> np.ndarray:
    """Level of each token ``(total,)`` uint8."""
    return np.rint(TOP * share(image, text_layers)).astype(np.uint8)


def pack(level: np.ndarray) -> str:
    """Levels as text: two in a byte, compressed, base64."""
    padded = np.append(level, 0)[: 2 * ((len(level) + 1) // 2)]
    return base64.b64encode(zlib.compress((padded[::2] << 4 | padded[1::2]).astype(np.uint8).tobytes(), 9)).decode("ascii")


def unpack(text: str, total: int) -> np.ndarray:
    """Levels ``(total,)`` uint8."""
    pairs = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.stack([pairs >> 4, pairs & TOP], axis=1).reshape(-1)[:total]


def regions(layout: ImageLayout) -> list[list[int]]:
    """The layout's rectangles; none where a model orders its tokens in another way than row by row."""
    found = []
    for region in layout.regions:
        rows, columns = region.shape
        first = int(region[0, 0])
        stride = int(region[1, 0]) - first if rows > 1 else columns
        expected = first + stride * torch.arange(rows)[:, None] + torch.arange(columns)
        if not torch.equal(region, expected):
            return []
        found.append([first, stride, rows, columns])
    return found


def by_sample(kept: Sequence[Kept], placeholders: Sequence[int]) -> list[list[Kept]] | None:
    """Images of a batch dealt to its samples, of which each has so many ``placeholders``; None where they do not fit."""
    waiting = list(kept)
    dealt: list[list[Kept]] = []
    for count in placeholders:
        mine: list[Kept] = []
        while waiting and sum(image["total"] for image in mine) + waiting[0]["total"] <= count:
            mine.append(waiting.pop(0))
        if sum(image["total"] for image in mine) != count:
            return None
        dealt.append(mine)
    return dealt if not waiting else None
