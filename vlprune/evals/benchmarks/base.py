"""What every benchmark is: a name, examples, a score for each answer, and a summary of all of them."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vlprune.errors import VLPruneError
from vlprune.evals.metrics import MEAN, Estimate, estimate

Row = Mapping[str, Any]
"""An answered example: ``id``, ``category``, ``answers``, ``details``, ``prediction`` (None: failed) and ``score``."""
Picture = bytes | Image.Image | Callable[[], bytes | Image.Image]
"""An image as it came: encoded, decoded, or a function that reads either when it is asked."""


class DataError(VLPruneError):
    """Data that cannot be found, or that is not what the benchmark needs."""


class ImageError(DataError):
    """An image that cannot be decoded."""


@dataclass(frozen=True)
class Example:
    """One question about one image.

    ``question`` is all the text that the model is shown, the benchmark's instruction included. ``details`` is what scoring
    needs beside ``answers``, and can be written as JSON.
    """

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    picture: Picture = field(repr=False, compare=False)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        """The picture, decoded at each call, as RGB; raises :class:`ImageError` where it cannot be."""
        picture = self._read()
        if isinstance(picture, bytes):
            picture = _decode(self.id, picture)
        return picture.convert("RGB")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that the model sees and scoring needs, without decoding the image."""
        text = json.dumps([self.id, self.category, self.question, self.answers, self.details], sort_keys=True)
        digest = hashlib.sha256(text.encode())
        picture = self._read()
        digest.update(picture if isinstance(picture, bytes) else f"{picture.mode} {picture.size}".encode() + picture.tobytes())
        return digest.hexdigest()

    def _read(self) -> bytes | Image.Image:
        return self.picture() if callable(self.picture) else self.picture


def _decode(name: str, content: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except Exception as error:
        # Decoders raise what comes to hand: OSError, SyntaxError, ValueError, DecompressionBombError, ...
        raise ImageError(f"{name}: {len(content)} bytes that cannot be read as an image: {error}") from error
    return picture


@dataclass(frozen=True)
class Number:
    """A score of many samples with its 95 % interval, all of them between 0 and ``maximum``."""

    value: float
    low: float
    high: float
    samples: int
    maximum: float = 1.0

    @classmethod
    def of(cls, found: Estimate, samples: int, maximum: float = 1.0) -> Number:
        return cls(found.value, found.low, found.high, samples, maximum)


@dataclass(frozen=True)
class Summary:
    """``numbers`` are scores of all samples by name, one for each convention; ``headline`` names the one to quote first.

    ``categories`` holds the headline's counterpart for each category, in order of appearance. ``failed`` counts the samples
    without a prediction; they count as wrong.
    """

    headline: str
    numbers: dict[str, Number]
    categories: dict[str, Number] = field(default_factory=dict)
    failed: int = 0

    @property
    def main(self) -> Number:
        return self.numbers[self.headline]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Scorer = Callable[[str, "Row | Example"], float]
"""From an answer, and the example that it is to, to a score in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """Fields of a subclass are its options, as :func:`vlprune.evals.benchmarks.find` takes them.

    ``conventions`` are the ways in which answers are scored, by name; the first gives the headline.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    conventions: ClassVar[Mapping[str, Scorer]]
    max_new_tokens: ClassVar[int] = 16

    @property
    @abstractmethod
    def version(self) -> str:
        """What data exactly: where it is from, its revision, its split, and options that change a prompt or a score."""

    @abstractmethod
    def examples(self, limit: int | None = None) -> list[Example]:
        """The examples, or the first ``limit`` of them, always in the same order; no image is decoded."""

    def score(self, row: Row | Example, prediction: str | None) -> float:
        """Score of one answer in [0, 1]; no prediction is a wrong one."""
        return 0.0 if prediction is None else next(iter(self.conventions.values()))(prediction, row)

    def summary(self, rows: Sequence[Row]) -> Summary:
        """Mean over samples by each convention, over all and, by the first, for each category."""
        first, *others = self.conventions
        scores = {first: [float(row["score"]) for row in rows]}
        scores |= {name: scores_by(self.conventions[name], rows) for name in others}
        return mean_summary(rows, scores)

    @classmethod
    def options(cls) -> list[str]:
        return [one.name for one in fields(cls)]


def scores_by(scorer: Scorer, rows: Iterable[Row]) -> list[float]:
    return [0.0 if row["prediction"] is None else scorer(row["prediction"], row) for row in rows]


def by_answers(score: Callable[[str, Sequence[str]], float]) -> Scorer:
    """A scorer that looks at nothing but the answers."""
    return lambda prediction, row: score(prediction, answers_of(row))


def mean_summary(rows: Sequence[Row], scores: Mapping[str, Sequence[float]]) -> Summary:
    """A summary by means over samples: ``scores`` has one list for each convention, the headline's first."""
    headline = next(iter(scores))
    categories = {
        category: mean_number([scores[headline][index] for index in indices])
        for category, indices in by_category(rows).items()
        if category
    }
    return Summary(headline, {name: mean_number(values) for name, values in scores.items()}, categories, failures(rows))


def mean_number(scores: Sequence[float]) -> Number:
    column = np.array(scores, dtype=np.float64)[:, None]
    return Number.of(estimate([(MEAN, column)]), len(column))


def by_category(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Places of the rows of each category, in order of appearance."""
    found: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row["category"], []).append(index)
    return found


def failures(rows: Iterable[Row]) -> int:
    return sum(row["prediction"] is None for row in rows)


def answers_of(row: Row | Example) -> Sequence[str]:
    return row.answers if isinstance(row, Example) else row["answers"]


def details_of(row: Row | Example) -> Mapping[str, Any]:
    return row.details if isinstance(row, Example) else row["details"]
