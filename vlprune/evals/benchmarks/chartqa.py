"""ChartQA: questions about charts, half written by people (human_test) and half generated (augmented_test)."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.evals.benchmarks.base import Example, by_answers
from vlprune.evals.benchmarks.loaded import Loaded
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import relaxed_accuracy

SINGLE_WORD = "\nAnswer the question with a single word."


@dataclass(frozen=True, kw_only=True)
class ChartQA(Loaded):
    """The halves are categories; since they are of one size, their mean is the accuracy over all."""

    name = "chartqa"
    title = "ChartQA"
    repository = "ChartQA"
    conventions = {"relaxed accuracy": by_answers(relaxed_accuracy)}
    split: str = "test"

    def example(self, record: Record) -> Example:
        question = record.text("question") + SINGLE_WORD
        # The data have no ids.
        return Example(str(record.place), record.text("type"), question, record.texts("answer"), record.picture)
