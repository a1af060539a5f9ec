"""The first tab's work: one question, answered without a method and with two, then the pictures of what they kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlprune import visualize
from vlprune.demos import page, requests
from vlprune.demos.answers import Answer, Answerer, Question
from vlprune.errors import VLPruneError
from vlprune.visualize import drawing, show

ALL = "all stages together"
SIDE = 640
"""Pixels of the longer side of pictures."""
PANEL = 300
"""The same of a panel among others."""
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a method did to an image. ``kept``: a picture for each stage; ``groups`` is None where nothing was merged."""

    image: Image.Image
    kept: dict[str, Image.Image] = field(default_factory=dict)
    stages: Image.Image | None = None
    groups: Image.Image | None = None
    scores: dict[str, Image.Image] = field(default_factory=dict)

    def sheet(self, title: str) -> Image.Image:
        """Every stage, the merged groups and the scores, with their names below them."""
        panels = [(name, picture) for name, picture in self.kept.items() if name != ALL] or [(ALL, self.kept[ALL])]
        panels += [("merged tokens, by group", self.groups)] if self.groups else []
        panels += [(f"score: {name}", picture) for name, picture in self.scores.items()]
        return drawing.sheet(
            [(name, drawing.enlarged(picture, PANEL)[0]) for name, picture in panels], 3 if len(panels) > 4 else 2, title=title
        )

    def pair(self, stage: str) -> tuple[Image.Image, Image.Image]:
        """The image, and what is kept of it at a stage; at the last one before it where the method has no such stage."""
        return self.image, self.kept.get(stage) or self.kept[ALL]


def pictures(processor: Any, image: Image.Image, answer: Answer) -> Pictures:
    plain, _ = drawing.enlarged(image, SIDE)
    if answer.report is None or answer.seen is None:
        return Pictures(plain, {ALL: plain})
    report, seen = answer.report, answer.seen
    options: Any = {"processor": processor, "side": SIDE}
    scene = show.Scene.of(image, report, None, processor, SIDE)
    kept = {ALL: visualize.show_kept(image, report, **options)}
    for name, shares in show.stages(scene.images):
        kept[name] = drawing.kept(scene.frames[0], scene.views, shares)
    groups, scores = None, {}
    if len(report.images) == 1 and seen.choices:
        if (seen.groups() >= 0).any():
            groups = visualize.show_merge_groups(image, report, seen, **options)
        scores = {name: visualize.show_scores(image, report, seen, name, **options) for name in list(seen.scores())[:6]}
    stages = visualize.show_stages(image, report, processor=processor, side=260, across=4)
    return Pictures(plain, kept, stages, groups, scores)


@dataclass(frozen=True, eq=False)
class Progress:
    """What is known so far; ``pictures`` are there once everything has been answered."""

    names: list[str]
    texts: list[str | None]
    answers: list[Answer]
    pictures: list[Pictures] = field(default_factory=list)

    @property
    def cards(self) -> str:
        return page.answers(self.names, self.texts, len(self.answers))


def compare(
    answerer: Answerer, path: str | None, question: str | None, choices: list[tuple[str, float]]
) -> Iterator[Progress]:
    """Answers without a method, then with each of ``choices`` (name, percent); the answers grow."""
    asked = Question(requests.image(path), requests.question(question))
    methods = [None, *(requests.method(*choice) for choice in choices)]
    names = [requests.UNPRUNED, *(requests.label(*choice) for choice in choices)]
    texts: list[str | None] = [None] * len(names)
    answers: list[Answer] = []
    yield Progress(names, texts, answers)
    for place, method in enumerate(methods):
        for piece in answerer.stream(asked, method):
            if isinstance(piece, Answer):
                answers.append(piece)
                texts[place] = piece.text
            else:
                texts[place] = piece
            yield Progress(names, texts, answers)
    drawn = [pictures(answerer.loaded.processor, asked.image, answer) for answer in answers[1:]]
    yield Progress(names, texts, answers, drawn)


def message(error: Exception) -> str:
    """What a person is told of an error; what nobody foresaw goes to the log in full."""
    if isinstance(error, VLPruneError):
        return " ".join(str(error).split())
    LOG.error("a request failed", exc_info=error)
    if "out of memory" in str(error).lower():
        return "The device ran out of memory; try a smaller image."
    return f"This could not be answered ({type(error).__name__}). The log of the server says why."
