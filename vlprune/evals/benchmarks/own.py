"""A user's own data: images, questions and answers in a folder, a JSONL file or a parquet file, and a metric by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmarks.base import (
    Benchmark,
    DataError,
    Example,
    Number,
    Row,
    Summary,
    answers_of,
    by_category,
    failures,
)
from vlprune.evals.benchmarks.loaded import distinct_ids
from vlprune.evals.benchmarks.source import Record, Source, open_table
from vlprune.evals.metrics import NAMED, Metric, estimate

PEOPLE = 10
"""Answers that VQA accuracy is made for."""
INDEXES = ("*.jsonl", "*.parquet")
"""What a folder has exactly one of; paths of images in it are relative to its own place."""


@dataclass(frozen=True, kw_only=True)
class Own(Benchmark):
    """``path``: a JSONL or parquet file, or a folder with one. A row has an image, a question, and an answer or several.

    ``metric``: vqa, anls, relaxed, exact (any of the answers) or yes-no (F1). ``image``, ``question``, ``answers``: names of
    columns; an image is a path, or in parquet also its bytes. ``id`` and ``category`` may be columns; without the first, rows
    are numbered. ``instruction`` is appended to each question on a line of its own.
    """

    name = "own"
    title = "own data"
    path: str
    metric: str = "exact"
    image: str = "image"
    question: str = "question"
    answers: str = "answers"
    instruction: str = "Answer the question using a single word or phrase."

    def __post_init__(self) -> None:
        if self.metric not in NAMED:
            raise OptionError(f"{self.path}: unknown metric {self.metric!r}: there are {', '.join(NAMED)}")

    @property
    def version(self) -> str:
        """The file's name and the beginning of its SHA-256; images beside it are not part of that."""
        index = self._index()
        with index.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{index.name} {digest[:12]}, {self.metric}, instruction {self.instruction!r}"

    def examples(self, limit: int | None = None) -> list[Example]:
        return list(distinct_ids(map(self._example, self._records(limit))))

    def score(self, row: Row | Example, prediction: str | None) -> float:
        return self._scored.sample(prediction, answers_of(row))

    def summary(self, rows: Sequence[Row]) -> Summary:
        groups = {name: [rows[place] for place in places] for name, places in by_category(rows).items() if name}
        categories = {name: self._number(group) for name, group in groups.items()}
        return Summary(self._scored.name, {self._scored.name: self._number(rows)}, categories, failures(rows))

    @property
    def _scored(self) -> Metric:
        return NAMED[self.metric]

    def _number(self, rows: Sequence[Row]) -> Number:
        counts = self._scored.contributions([row["prediction"] for row in rows], [row["answers"] for row in rows])
        return Number.of(estimate([(self._scored, counts)]), len(rows))

    def _index(self) -> Path:
        path = Path(self.path)
        if not path.is_dir():
            return path
        found = sorted(one for pattern in INDEXES for one in path.glob(pattern))
        if len(found) != 1:
            names = ", ".join(one.name for one in found) or "none"
            raise DataError(f"{path}: a folder of own data has exactly one file {' or '.join(INDEXES)}; this one has {names}")
        return found[0]

    def _records(self, limit: int | None) -> Iterator[Record]:
        index = self._index()
        if index.suffix == ".jsonl":
            return _lines(index, self.image, limit)
        if index.suffix == ".parquet":
            return open_table(Source("", None, "train", str(index))).records(limit, self.image)
        raise DataError(f"{index}: own data are a .jsonl or a .parquet file, or a folder with one")

    def _example(self, record: Record) -> Example:
        instruction = f"\n{self.instruction}" if self.instruction else ""
        return Example(
            record.text("id") if "id" in record.values else str(record.place),
            record.text("category") if "category" in record.values else "",
            record.text(self.question) + instruction,
            self._answers(record),
            record.picture,
        )

    def _answers(self, record: Record) -> tuple[str, ...]:
        """A single answer to be scored by VQA accuracy counts as if all ten people had given it."""
        if self.metric == "yes-no":
            return (record.one_of(self.answers, ("yes", "no")),)
        given = record.texts(self.answers)
        if self.metric != "vqa" or len(given) == PEOPLE:
            return given
        if len(given) == 1:
            return given * PEOPLE
        raise record.refusal(self.answers, f"one answer or {PEOPLE} for VQA accuracy, which leaves each out once")


def _lines(index: Path, image: str, limit: int | None) -> Iterator[Record]:
    place = -1
    with index.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place += 1
            if limit is not None and place >= limit:
                return
            where = f"{index}, line {number}"
            values = _object(line, where)
            record = Record(values, place, where)
            picture = index.parent / record.text(image)
            if not picture.is_file():
                raise DataError(f"{where}: there is no image {picture}")
            yield Record(values, place, where, picture.read_bytes)
    if place < 0:
        raise DataError(f"{index}: there are no rows")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: a line holds an object such as {{'image': 'a.png', 'question': ..., 'answers': [...]}}")
    return values
