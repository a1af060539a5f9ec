"""What training has to know of a model, and in which TinyVLM's siblings differ."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlprune.evals.synthvqa import SIZE, Box

CELL = 8
"""Side, in pixels of a view, of the square that one visual token shows."""


@dataclass(frozen=True)
class View:
    """A square part of an image as the encoder gets it: ``cells`` x ``cells`` visual tokens.

    ``origin`` is its left upper corner in pixels of the image, ``scale`` its size in comparison with what it shows.
    """

    cells: int
    origin: tuple[int, int] = (0, 0)
    scale: float = 1.0

    @property
    def readable(self) -> bool:
        """Whether characters are large enough to be read."""
        return self.scale >= 1

    @property
    def box(self) -> Box:
        """The part of the image that is shown."""
        (left, top), side = self.origin, round(self.cells * CELL / self.scale)
        return left, top, left + side, top + side

    def within(self, box: Box) -> tuple[range, range]:
        """Rows and columns of the cells whose centre lies in ``box``, which is in pixels of the image."""
        return self._span(box[1], box[3], self.origin[1]), self._span(box[0], box[2], self.origin[0])

    def _span(self, low: float, high: float, start: int) -> range:
        first, last = (math.ceil((v - start) * self.scale / CELL - 0.5) for v in (low, high))
        return range(min(max(first, 0), self.cells), min(max(last, 0), self.cells))


class Architecture(ABC):
    """One of TinyVLM's siblings.

    The vision encoder sees an image as :attr:`views`, all of the same number of cells. In a prompt the image is
    :attr:`before`, :attr:`visual_tokens` times :attr:`image`, :attr:`after`; ``before`` is a single token.
    """

    views: tuple[View, ...]
    visual_tokens: int
    before: str
    image: str
    after: str
    end: str
    """What ends an answer."""
    pad: str
    dtype: torch.dtype = torch.float32
    """In which the weights are shipped."""

    @abstractmethod
    def tokenizer(self) -> Any: ...

    @abstractmethod
    def model(self, seed: int = 0) -> Any:
        """The model with fresh weights, float32."""

    @abstractmethod
    def save_processor(self, folder: Path) -> None:
        """Everything but config and weights, as both transformers 4.57 and 5.x read it."""

    @abstractmethod
    def encoder(self, model: Any) -> list[nn.Module]:
        """The modules that the first stage trains and that the second one freezes for a while."""

    @abstractmethod
    def width(self, model: Any) -> int:
        """Width of :meth:`features`."""

    @abstractmethod
    def features(self, model: Any, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """What the encoder makes of images: cells ``(images * views, cells ** 2, width)`` row by row, and one vector a
        view, ``(images * views, width)``, that stands for all of it.

        Where the architecture takes images of any size, they may be crops, whose only view they are.
        """

    def positions(self) -> Tensor:
        """``(visual tokens, 2)``: rows and columns from 0 to 1, NaN where a token shows no place of the image, or too much."""
        found = torch.full((self.visual_tokens, 2), torch.nan)
        cells = range(0, SIZE, CELL)
        for top, left in itertools.product(cells, cells):
            for place in self.places((left, top, left + CELL, top + CELL), glimpse=False):
                found[place] = torch.tensor([top + CELL / 2, left + CELL / 2]) / SIZE
        return found

    def training(self, model: Any) -> AbstractContextManager[Any]:
        """Within it the model computes the same, faster, on images of one size."""
        return nullcontext()

    @abstractmethod
    def inputs(self, images: list[Image.Image], ids: Tensor) -> dict[str, Tensor]:
        """What the model takes besides ``ids (B, L)``: one image of 128 x 128 pixels for each row."""

    @abstractmethod
    def places(self, box: Box, glimpse: bool = True) -> Iterable[int]:
        """Visual tokens, in the order of the prompt, whose centre lies in ``box``; with ``glimpse`` also those of views
        that are too small to read."""

    def hub_name(self, name: str) -> str:
        """The name that a parameter has in checkpoints of the hub."""
        return name

    def hub_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """``config.json`` as both transformers 4.57 and 5.x read it."""
        return config
