"""SynthVQA: a seeded generator of images and questions of the kinds that VQA benchmarks ask.

Every sample is a pure function of ``(VERSION, split, index)``. Three layouts (a *scene* with signs and shapes, a *form*
with labelled boxes, a *bar chart*) carry six kinds of question; each kind is scored by the metric of its real counterpart:

========== =========================================================== ==================== =================
kind       example                                                     counterpart          metric
========== =========================================================== ==================== =================
text       What does the red sign say?                                 TextVQA              VQA accuracy
form       What is the total?                                          DocVQA               ANLS
chart      What is the value of the blue bar?                          ChartQA              relaxed accuracy
presence   Is there a green circle?                                    POPE                 F1 of "yes"
relation   Is the red cross left of the blue circle?                   GQA                  exact match
counting   How many circles are there?                                 VQAv2 (number)       exact match
========== =========================================================== ==================== =================

Objects vary in size and place, so a question about a detail needs few, particular visual tokens. Text is never cut by
the border between two tiles: reading across it is beyond a model of a few million parameters.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

VERSION = 1
SIZE = 128
"""Width and height of an image in pixels."""
TILE = 64
KINDS = ("text", "form", "chart", "presence", "relation", "counting")
COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (48, 92, 210),
    "yellow": (240, 200, 40),
    "purple": (150, 70, 190),
    "orange": (240, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
KEYS = ("name", "date", "city", "code", "total", "phone", "item", "room")
LETTERS = "ACEFHJKLMNPRTUVXY"
DIGITS = "0123456789"
DIRECTIONS = (("left of", 0), ("above", 1))
CLEARLY = 20
"""Pixels between the middles of two shapes, at least, for one to be left of the other or above it."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, right and bottom exclusive."""


@dataclass(frozen=True)
class Item:
    """One thing in an image.

    ``kind`` is one of :data:`SHAPES`, ``sign``, ``bar`` or ``field``; ``name`` is its colour, or its key for a field.
    ``text`` is what is written on it and ``glyphs`` holds one box for each character of ``text``.
    """

    kind: str
    name: str
    box: Box
    text: str = ""
    glyphs: tuple[Box, ...] = ()

    @property
    def phrase(self) -> str:
        return f"{self.name} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Question:
    """``answers`` holds the ten references of VQA accuracy for ``text`` questions and a single one otherwise."""

    kind: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """What an image shows, before it is drawn; ``layout`` is ``scene``, ``form`` or ``chart``."""

    layout: str
    background: tuple[int, int, int]
    items: tuple[Item, ...]
    questions: tuple[Question, ...] = field(compare=False)

    def draw(self) -> Image.Image:
        """The picture: RGB, ``SIZE`` x ``SIZE`` pixels."""
        image = Image.new("RGB", (SIZE, SIZE), self.background)
        draw = ImageDraw.Draw(image)
        if self.layout == "chart":
            draw.line((6, SIZE - 9, SIZE - 4, SIZE - 9), fill=(60, 60, 60), width=2)
        for item in self.items:
            _draw_item(draw, item)
        return image

    def caption(self, box: Box = (0, 0, SIZE, SIZE)) -> str:
        """A caption of what lies in ``box`` (centre inside), from top to bottom: "red sign K7P, blue circle"."""
        inside = [i for i in self.items if box[0] <= i.centre[0] < box[2] and box[1] <= i.centre[1] < box[3]]
        inside.sort(key=lambda item: (item.box[1] // 16, item.box[0]))
        return ", ".join(f"{item.phrase} {item.text}".strip() for item in inside)


@dataclass(frozen=True)
class Example:
    """One evaluation row: an image with one question."""

    id: str
    kind: str
    image: Image.Image
    question: str
    answers: tuple[str, ...]


def scene(split: str, index: int, layout: str | None = None) -> Scene:
    """Scene number ``index`` of ``split`` (``train`` or ``test``).

    A scene belongs to the split that the hash of its content names (one in eight to ``test``), so no image is in both.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: SynthVQA has 'train' and 'test'")
    rng = random.Random(f"synthvqa/{VERSION}/{split}/{index}")
    layout = layout or rng.choice(("scene", "scene", "form", "chart"))
    while True:
        drawn = _LAYOUTS[layout](rng)
        digest = hashlib.sha256(repr((drawn.background, drawn.items)).encode()).digest()
        if (digest[0] % 8 == 0) == (split == "test"):
            return drawn


def examples(split: str = "test", count: int = 720) -> Iterator[Example]:
    """The first ``count`` evaluation rows of ``split``: the kinds take turns, answers of one kind are kept balanced."""
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        layout = kind if kind in ("form", "chart") else "scene"
        picture = next(p for p in _alternatives(split, index, layout) if any(q.kind == kind for q in p.questions))
        question = _pick(picture, kind, random.Random(f"pick/{VERSION}/{split}/{index}"))
        yield Example(f"{split}-{index:05d}", kind, picture.draw(), question.text, question.answers)


def _alternatives(split: str, index: int, layout: str) -> Iterator[Scene]:
    """Scene ``index`` and others to fall back on: a crowded scene can lack the shapes that a question is about."""
    for attempt in itertools.count():
        yield scene(split, index + attempt * 1_000_000_000, layout)


def _pick(picture: Scene, kind: str, rng: random.Random) -> Question:
    """One question of ``kind``: first an answer, then a question that has it, so that rare answers are asked for too."""
    questions = [q for q in picture.questions if q.kind == kind]
    answer = rng.choice(sorted({q.answers[0] for q in questions}))
    return rng.choice([q for q in questions if q.answers[0] == answer])


# ------------------------------------------------------------------ layouts


def _scene(rng: random.Random) -> Scene:
    items: list[Item] = []
    for colour in rng.sample(list(COLOURS), rng.randint(1, 3)):
        text = "".join(rng.choice(LETTERS + DIGITS[2:]) for _ in range(3))
        cell = rng.choice(((8, 14), (10, 16)))
        place = _place(rng, items, 3 * cell[0] + 6, cell[1] + 4, within_tile=True)
        if place:
            items.append(Item("sign", colour, place, text, _glyphs(place, len(text), cell)))
    for _ in range(rng.randint(3, 5)):
        side = rng.choice((14, 18, 22, 26))
        place = _place(rng, items, side, side)
        if place:
            favoured = [i.kind for i in items if i.kind in SHAPES]
            kind = rng.choice(favoured) if favoured and rng.random() < 0.35 else rng.choice(SHAPES)
            items.append(Item(kind, rng.choice(list(COLOURS)), place))
    return Scene("scene", _background(rng), tuple(items), tuple(_scene_questions(rng, items)))


def _form(rng: random.Random) -> Scene:
    items: list[Item] = []
    corners = [(x, y) for x in (0, TILE) for y in (0, TILE // 2, TILE, TILE + TILE // 2)]
    keys = rng.sample(KEYS, rng.randint(3, 5))
    for key, (x, y) in zip(keys, sorted(rng.sample(corners, len(keys))), strict=True):
        text = "".join(rng.choice(DIGITS if key in ("total", "date", "phone") else LETTERS) for _ in range(4))
        left = x + 4 * rng.randint(1, 4)
        box = (left, y + 1, left + 42, y + 31)
        items.append(Item("field", key, box, text, _glyphs((left, y + 14, left + 42, y + 31), 4, (9, 14))))
    questions = [_question("form", f"What is the {i.name}?", i.text) for i in items]
    return Scene("form", _background(rng), tuple(items), tuple(questions))


def _chart(rng: random.Random) -> Scene:
    colours = rng.sample(list(COLOURS), rng.randint(3, 4))
    heights = rng.sample(range(2, 14), len(colours))
    items = []
    for slot, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        left = 8 + 30 * slot + rng.choice((0, 2))
        top = SIZE - 10 - 8 * height
        text_top = TILE if TILE - 18 < top < TILE else top + 2
        box = (left, min(top, text_top), left + 22, SIZE - 10)
        text = str(height * 7 - rng.randint(0, 6))
        glyphs = _glyphs((left, text_top, left + 22, text_top + 16), len(text), (9, 14))
        items.append(Item("bar", colour, box, text, glyphs))
    ranked = sorted(items, key=lambda item: int(item.text))
    questions = [_question("chart", f"What is the value of the {i.name} bar?", i.text) for i in items]
    questions.append(_question("chart", "Which bar is the highest?", ranked[-1].name))
    return Scene("chart", (250, 250, 250), tuple(items), tuple(questions))


_LAYOUTS: dict[str, Callable[[random.Random], Scene]] = {"scene": _scene, "form": _form, "chart": _chart}


def _background(rng: random.Random) -> tuple[int, int, int]:
    return tuple(rng.randrange(205, 246, 8) for _ in range(3))  # pyright: ignore[reportReturnType]


def _place(rng: random.Random, items: list[Item], width: int, height: int, within_tile: bool = False) -> Box | None:
    """A free place on a lattice of 4 pixels, or None where 30 tries found none."""
    for _ in range(30):
        left, top = 4 * rng.randrange((SIZE - width) // 4 + 1), 4 * rng.randrange((SIZE - height) // 4 + 1)
        box = (left, top, left + width, top + height)
        if within_tile and (left // TILE != (box[2] - 1) // TILE or top // TILE != (box[3] - 1) // TILE):
            continue
        if all(_apart(box, item.box) for item in items):
            return box
    return None


def _apart(one: Box, other: Box) -> bool:
    """Whether two pixels or more lie between two boxes."""
    return any(a[axis] >= b[axis + 2] + 2 for a, b in ((one, other), (other, one)) for axis in (0, 1))


def _glyphs(box: Box, count: int, cell: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes of ``count`` characters of ``cell`` (width, height), centred in ``box``."""
    left = (box[0] + box[2] - count * cell[0]) // 2
    top = (box[1] + box[3] - cell[1]) // 2
    return tuple((left + k * cell[0], top, left + (k + 1) * cell[0], top + cell[1]) for k in range(count))


# ------------------------------------------------------------------ questions


def _question(kind: str, text: str, answer: str) -> Question:
    return Question(kind, text, (answer,) * (10 if kind == "text" else 1))


def _scene_questions(rng: random.Random, items: list[Item]) -> Iterator[Question]:
    shapes = [i for i in items if i.kind in SHAPES]
    for item in items:
        if item.kind == "sign":
            yield _question("text", f"What does the {item.name} sign say?", item.text)
    yield from _presence(rng, shapes)
    yield from _relations(rng, shapes)
    for kind in SHAPES:
        plural = "crosses" if kind == "cross" else f"{kind}s"
        yield _question("counting", f"How many {plural} are there?", str(sum(i.kind == kind for i in shapes)))


def _presence(rng: random.Random, shapes: list[Item]) -> Iterator[Question]:
    """Two that are there and two that are not, each of which shares its colour or its shape with one that is."""
    present = sorted({(i.name, i.kind) for i in shapes})
    alike = {(c, k) for c, _ in present for k in SHAPES} | {(c, k) for c in COLOURS for _, k in present}
    absent = sorted(alike - set(present))
    for pairs, answer in ((present, "yes"), (absent, "no")):
        for colour, kind in rng.sample(pairs, min(2, len(pairs))):
            yield _question("presence", f"Is there a {colour} {kind}?", answer)


def _relations(rng: random.Random, shapes: list[Item]) -> Iterator[Question]:
    kinds = [i.kind for i in shapes]
    for item in shapes:
        if kinds.count(item.kind) == 1:
            yield _question("relation", f"What colour is the {item.kind}?", item.name)
    single = _single(shapes)
    for word, axis in DIRECTIONS:
        pairs = [(a, b) for a in single for b in single if abs(a.centre[axis] - b.centre[axis]) >= CLEARLY]
        for a, b in rng.sample(pairs, min(2, len(pairs))):
            yield _comparison(a, word, axis, b)


def comparisons(scene: Scene) -> list[Question]:
    """Every question that compares the places of two shapes of ``scene``, which asks a few of them."""
    single = _single([i for i in scene.items if i.kind in SHAPES])
    return [
        _comparison(a, word, axis, b)
        for word, axis in DIRECTIONS
        for a, b in itertools.permutations(single, 2)
        if abs(a.centre[axis] - b.centre[axis]) >= CLEARLY
    ]


def _single(shapes: list[Item]) -> list[Item]:
    """Those that colour and shape tell from all others."""
    return [i for i in shapes if sum(j.phrase == i.phrase for j in shapes) == 1]


def _comparison(one: Item, word: str, axis: int, other: Item) -> Question:
    answer = "yes" if one.centre[axis] < other.centre[axis] else "no"
    return _question("relation", f"Is the {one.phrase} {word} the {other.phrase}?", answer)


# ------------------------------------------------------------------ drawing


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("SynthVQA draws with the font that Pillow bundles, which needs a Pillow built with FreeType")
    return font


def _draw_item(draw: ImageDraw.ImageDraw, item: Item) -> None:
    left, top, right, bottom = item.box
    edge = (right - 1, bottom - 1)
    if item.kind == "field":
        draw.text((left + 2, top), item.name, font=_font(11), fill=(70, 70, 90))
        draw.rectangle((left, top + 13, *edge), fill=(255, 255, 255), outline=(90, 90, 90))
        _draw_text(draw, item, (20, 20, 20))
        return
    fill = COLOURS[item.name]
    if item.kind == "circle":
        draw.ellipse((left, top, *edge), fill=fill)
    elif item.kind == "triangle":
        draw.polygon(((left + right - 1) / 2, top, right - 1, bottom - 1, left, bottom - 1), fill=fill)
    elif item.kind == "cross":
        third = (right - left) // 3
        draw.rectangle((left + third, top, right - 1 - third, bottom - 1), fill=fill)
        draw.rectangle((left, top + third, right - 1, bottom - 1 - third), fill=fill)
    else:
        draw.rectangle((left, top, *edge), fill=fill)
    _draw_text(draw, item, (0, 0, 0) if item.name in ("yellow", "orange") else (255, 255, 255))


def _draw_text(draw: ImageDraw.ImageDraw, item: Item, fill: tuple[int, int, int]) -> None:
    for char, (left, top, right, bottom) in zip(item.text, item.glyphs, strict=True):
        middle = ((left + right) / 2, (top + bottom) / 2)
        draw.text(middle, char, font=_font(bottom - top), fill=fill, anchor="mm")
