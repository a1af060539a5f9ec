"""DocVQA: questions about scanned pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vlprune.evals.benchmarks.base import Example, by_answers
from vlprune.evals.benchmarks.loaded import SHORT_ANSWER, Loaded
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import anls


@dataclass(frozen=True, kw_only=True)
class DocVQA(Loaded):
    """Only the split validation has answers."""

    name = "docvqa"
    title = "DocVQA"
    repository = "DocVQA"
    config = "DocVQA"
    max_new_tokens = 32
    conventions = {"ANLS": by_answers(anls), "ANLS, LLaVA's script": by_answers(partial(anls, folded_lengths=True))}
    split: str = "validation"

    def example(self, record: Record) -> Example:
        question = record.text("question") + SHORT_ANSWER
        return Example(record.text("questionId"), "", question, record.texts("answers"), record.picture)
