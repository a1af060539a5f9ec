"""GQA: compositional questions about photographs, 12,578 of them about 398 images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from vlprune.evals.benchmarks.base import DataError, Example, Picture, by_answers
from vlprune.evals.benchmarks.loaded import SHORT_ANSWER, Loaded
from vlprune.evals.benchmarks.source import Record, open_table
from vlprune.evals.metrics import exact_match

INSTRUCTIONS, IMAGES = "testdev_balanced_instructions", "testdev_balanced_images"


@dataclass(frozen=True, kw_only=True)
class GQA(Loaded):
    """Questions and images are in two configurations of the repository, joined by the image's id."""

    name = "gqa"
    title = "GQA"
    repository = "GQA"
    config = INSTRUCTIONS
    conventions = {
        "exact match": by_answers(exact_match),
        "official script": by_answers(partial(exact_match, official=True)),
    }
    split: str = "testdev"

    def records(self, limit: int | None) -> Iterator[Record]:
        pictures = self._pictures()
        for record in self.table.records(limit, image=None):
            name = record.text("imageId")
            if name not in pictures:
                raise DataError(f"{record.where}, row {record.place}: there is no image {name!r} among the {len(pictures)}")
            yield dataclasses.replace(record, picture=pictures[name])

    def _pictures(self) -> dict[str, Picture]:
        images = open_table(self.source(IMAGES))
        return {record.text("id"): record.picture for record in images.records()}

    def example(self, record: Record) -> Example:
        question = record.text("question") + SHORT_ANSWER
        return Example(record.text("id"), "", question, record.texts("answer"), record.picture)
