"""Images to try: samples of SynthVQA, and pictures of other shapes with the same kinds of things on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlprune.evals import synthvqa

SAMPLES = 6
"""One of each kind of question."""


@dataclass(frozen=True)
class Example:
    name: str
    image: Image.Image
    question: str


def samples() -> list[Example]:
    found = [Example(one.kind, one.image, one.question) for one in synthvqa.examples(count=SAMPLES)]
    return [*found, wide(), tall()]


def wide() -> Example:
    """A form and a scene beside each other: a picture that is padded at top and bottom."""
    form, scene = synthvqa.scene("test", 3, "form"), synthvqa.scene("test", 8, "scene")
    picture = Image.new("RGB", (2 * synthvqa.SIZE, synthvqa.SIZE), form.background)
    picture.paste(form.draw(), (0, 0))
    picture.paste(scene.draw(), (synthvqa.SIZE, 0))
    return Example("wide", picture, form.questions[0].text)


def tall() -> Example:
    """A chart above a scene: a picture that is padded on both sides."""
    chart, scene = synthvqa.scene("test", 5, "chart"), synthvqa.scene("test", 11, "scene")
    picture = Image.new("RGB", (synthvqa.SIZE, 2 * synthvqa.SIZE), chart.background)
    picture.paste(chart.draw(), (0, 0))
    picture.paste(scene.draw(), (0, synthvqa.SIZE))
    return Example("tall", picture, "Which bar is the highest?")


def written(folder: Path) -> list[tuple[str, str]]:
    """Paths and questions of the examples, their pictures written into ``folder``."""
    paths = []
    for example in samples():
        path = folder / f"{example.name}.png"
        example.image.save(path)
        paths.append((str(path), example.question))
    return paths
