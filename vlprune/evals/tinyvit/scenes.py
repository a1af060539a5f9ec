"""What TinyViT is asked: which colour and which form the largest shape of a SynthVQA scene has.

Every picture is a pure function of ``(split, index)``: the middle of a scene, 112 x 112 of its 128 x 128 pixels at their own
scale. Signs, which may be larger than any shape, and the smaller shapes are there to distract.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from vlprune.evals import synthvqa
from vlprune.evals.synthvqa import COLOURS, SHAPES, Box, Item, Scene

SIZE = 112
"""Width and height of a picture in pixels."""
EDGE = (synthvqa.SIZE - SIZE) // 2
WINDOW: Box = (EDGE, EDGE, EDGE + SIZE, EDGE + SIZE)
"""Which part of a scene is seen."""
LABELS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
MARGIN = 1.25
"""By how much the area of the largest shape's box exceeds the next one's, at least."""


@dataclass(frozen=True)
class Picture:
    """``label`` indexes :data:`LABELS`; ``largest`` is the item that it names."""

    scene: Scene
    largest: Item

    @property
    def label(self) -> int:
        return LABELS.index(self.largest.phrase)

    def draw(self) -> Image.Image:
        """RGB, ``SIZE`` x ``SIZE`` pixels."""
        return self.scene.draw().crop(WINDOW)


def picture(split: str, index: int) -> Picture:
    """Picture number ``index`` of ``split`` (``train`` or ``test``): no scene is in both."""
    for attempt in itertools.count():
        scene = synthvqa.scene(split, index + attempt * 1_000_000_000, "scene")
        largest = largest_shape(scene)
        if largest is not None:
            return Picture(scene, largest)
    raise AssertionError("unreachable")


def pictures(split: str = "test", count: int = 600) -> Iterator[Picture]:
    """The first ``count`` pictures of ``split``."""
    return (picture(split, index) for index in range(count))


def largest_shape(scene: Scene) -> Item | None:
    """The shape of which most is seen; None where none is clearly the largest."""
    shapes = sorted((item for item in scene.items if item.kind in SHAPES), key=seen_area, reverse=True)
    areas = [seen_area(item) for item in shapes] + [0, 0]
    return shapes[0] if areas[0] > 0 and areas[0] >= MARGIN * areas[1] else None


def seen_area(item: Item) -> int:
    """Pixels of an item's box that lie in the window."""
    width, height = (min(item.box[axis + 2], EDGE + SIZE) - max(item.box[axis], EDGE) for axis in (0, 1))
    return max(0, width) * max(0, height)
