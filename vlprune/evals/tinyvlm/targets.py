"""What TinyVLM is told about a scene while it learns: what lies where, and where an answer can be seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlprune.evals import synthvqa
from vlprune.evals.synthvqa import TILE, Box, Question, Scene
from vlprune.evals.tinyvlm.architecture import CELL, Architecture, View

OWNERS = [
    "nothing",
    *(f"{c} {k}" for c in synthvqa.COLOURS for k in (*synthvqa.SHAPES, "sign", "bar")),
    *(f"{k} field" for k in synthvqa.KEYS),
]
GLYPHS = [" ", *sorted(set(synthvqa.LETTERS + synthvqa.DIGITS))]
PLACES = 5
"""Nothing, or the first to the fourth character of a text."""
COUNTS = 6
IGNORE = -100


def cell_targets(scene: Scene, views: Sequence[View]) -> np.ndarray:
    """(views, cells, 3) integers: owner, character and its place in the text, for every cell of every view.

    A cell belongs to what its centre lies in. Characters of a thumbnail are too small to read and count as nothing.
    """
    side = views[0].cells
    targets = np.zeros((len(views), side, side, 3), np.int64)
    for number, view in enumerate(views):
        if not view.readable:
            targets[number, ..., 1:] = IGNORE
        for item in scene.items:
            targets[(number, *_slices(view.within(item.box)), 0)] = OWNERS.index(item.phrase)
            if not view.readable:
                continue
            for place, (char, box) in enumerate(zip(item.text, item.glyphs, strict=True)):
                where = (number, *_slices(view.within(box)))
                targets[(*where, 1)] = GLYPHS.index(char)
                targets[(*where, 2)] = place + 1
    return targets.reshape(len(views), side * side, 3)


def _slices(ranges: tuple[range, range]) -> tuple[slice, slice]:
    rows, columns = ranges
    return slice(rows.start, rows.stop), slice(columns.start, columns.stop)


def caption_targets(scene: Scene, views: Sequence[View]) -> np.ndarray:
    """(views, owners + characters) of 0 and 1: what the caption of each view says; a thumbnail's names no characters."""
    targets = np.zeros((len(views), len(OWNERS) + len(GLYPHS)), np.float32)
    for number, view in enumerate(views):
        for item in scene.items:
            if not holds(view.box, item.centre):
                continue
            targets[number, OWNERS.index(item.phrase)] = 1
            for char in item.text if view.readable else "":
                targets[number, len(OWNERS) + GLYPHS.index(char)] = 1
    return targets


def count_targets(scene: Scene, view: View) -> list[int]:
    """How many of each shape a view shows (their centres)."""
    kinds = [item.kind for item in scene.items if holds(view.box, item.centre)]
    return [min(kinds.count(kind), COUNTS - 1) for kind in synthvqa.SHAPES]


def densest_tile(scene: Scene, characters: bool) -> View:
    """The quarter of the image with most characters, or with most items; among equals the first."""
    tiles = [View(TILE // CELL, (x, y)) for y in (0, TILE) for x in (0, TILE)]

    def content(tile: View) -> int:
        return sum(len(item.text) if characters else 1 for item in scene.items if holds(tile.box, item.centre))

    return max(tiles, key=content)


def holds(box: Box, point: tuple[float, float]) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def pointed_at(scene: Scene, question: Question, architecture: Architecture) -> list[list[int]]:
    """For each token of an answer, the visual tokens (from 0) that show it: a character, or what the question is about."""
    if question.kind in ("text", "form", "chart"):
        item = next((i for i in scene.items if i.text and i.text == question.answers[0] and i.name in question.text), None)
        return [list(architecture.places(box, glimpse=False)) for box in item.glyphs] if item else []
    plurals = {i: "crosses" if i.kind == "cross" else f"{i.kind}s" for i in scene.items}
    about = [i for i in scene.items if i.phrase in question.text or plurals[i] in question.text]
    about = about or [i for i in scene.items if f"colour is the {i.kind}" in question.text]
    seen = sorted({place for item in about for place in architecture.places(item.box)})
    return [seen] if seen else []


def mentions(scene: Scene, question: Question, architecture: Architecture) -> list[tuple[int, list[int]]]:
    """Where a question that compares two things has named one of them (characters read by then), and the visual tokens that
    show it."""
    named = [(question.text.find(item.phrase), item) for item in scene.items]
    if question.kind != "relation" or sum(start >= 0 for start, _ in named) != 2:
        return []
    return [(start + len(item.phrase), sorted(architecture.places(item.box))) for start, item in named if start >= 0]
