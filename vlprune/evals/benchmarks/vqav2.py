"""VQAv2: open questions about photographs, ten answers each."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.evals.benchmarks.base import Example, by_answers
from vlprune.evals.benchmarks.loaded import SHORT_ANSWER, Loaded
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import vqa_accuracy


@dataclass(frozen=True, kw_only=True)
class VQAv2(Loaded):
    """Categories are VQAv2's types of answer. Only the splits train and validation have answers."""

    name = "vqav2"
    title = "VQAv2"
    repository = "VQAv2"
    conventions = {
        "VQA accuracy": by_answers(lambda prediction, answers: vqa_accuracy(prediction, answers, "vqav2")),
        "official script": by_answers(lambda prediction, answers: vqa_accuracy(prediction, answers, "official")),
    }
    split: str = "validation"

    def example(self, record: Record) -> Example:
        return Example(
            record.text("question_id"),
            record.text("answer_type"),
            record.text("question") + SHORT_ANSWER,
            _answers(record),
            record.picture,
        )


def _answers(record: Record) -> tuple[str, ...]:
    """Of a list of dictionaries, as ``{"answer": "net", "answer_id": 1, ...}``."""
    given = record["answers"]
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) and "answer" in one for one in given):
        raise record.refusal("answers", "a list of dictionaries with an 'answer' each (the test splits have none)")
    return tuple(str(one["answer"]) for one in given)
