"""MME: two questions about each image, one to be answered with yes and one with no."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlprune.evals.benchmarks.base import Example, Number, Row, Summary, by_answers, by_category, failures, mean_number
from vlprune.evals.benchmarks.loaded import SHORT_ANSWER, Loaded
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import MEAN, estimate, mme_correct, mme_pairs

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
POINTS = 200
"""What a category can have: 100 for its accuracy over questions, 100 for the share of images with both answers right."""
ASKED = " Please answer yes or no."
"""The instruction of the data, which lmms-eval and LLaVA replace by theirs."""


@dataclass(frozen=True, kw_only=True)
class MME(Loaded):
    """The headline is the sum over all categories, at most 2800; many papers quote perception alone, at most 2000.

    Where only some categories have been asked, the maximum is less. An image of whose questions only one was asked does not
    count towards points.
    """

    name = "mme"
    title = "MME"
    repository = "MME"
    conventions = {"accuracy": by_answers(mme_correct)}
    split: str = "test"

    def example(self, record: Record) -> Example:
        image = record.text("question_id")
        question = record.text("question").strip().replace(ASKED, "") + SHORT_ANSWER
        answer = record.one_of("answer", ("yes", "no"))
        return Example(image, record.text("category"), question, (answer,), record.picture, {"image": image})

    def summary(self, rows: Sequence[Row]) -> Summary:
        points = {
            category: mme_pairs(pairs)
            for category, places in by_category(rows).items()
            if len(pairs := _pairs([rows[place] for place in places]))
        }
        accuracy = mean_number([float(row["score"]) for row in rows])
        parts = {"perception + cognition": PERCEPTION + COGNITION, "perception": PERCEPTION, "cognition": COGNITION}
        numbers = {name: _sum([points[one] for one in part if one in points]) for name, part in parts.items()}
        found = {name: number for name, number in numbers.items() if number is not None} | {"accuracy": accuracy}
        categories = {category: number for category, one in points.items() if (number := _sum([one])) is not None}
        return Summary(next(iter(found)), found, categories, failures(rows))


def _pairs(rows: Sequence[Row]) -> np.ndarray:
    """Scores ``(images, 2)`` of the images of which both questions were asked."""
    images: dict[str, list[float]] = {}
    for row in rows:
        images.setdefault(row["details"]["image"], []).append(float(row["score"]))
    return np.array([pair for pair in images.values() if len(pair) == 2]).reshape(-1, 2)


def _sum(points: Sequence[np.ndarray]) -> Number | None:
    """Sum over categories of their mean points ``(images, 1)``."""
    if not points:
        return None
    found = estimate([(MEAN, one) for one in points], over_groups=np.sum)
    return Number.of(found, sum(map(len, points)), POINTS * len(points))
