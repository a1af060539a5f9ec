"""TextVQA: questions whose answers are written in the image, ten answers each."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.evals.benchmarks.base import Example, by_answers
from vlprune.evals.benchmarks.loaded import SHORT_ANSWER, Loaded
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import vqa_accuracy


@dataclass(frozen=True, kw_only=True)
class TextVQA(Loaded):
    """Questions begin with their only capital, as in lmms-eval.

    ``ocr`` shows the tokens that an OCR system has read, as LLaVA's own evaluation does: LLaVA-1.5-7B is published with 58.2
    that way, and with 46.1 without, as HiRED's paper has it.
    """

    name = "textvqa"
    title = "TextVQA"
    repository = "textvqa"
    conventions = {"VQA accuracy": by_answers(vqa_accuracy)}
    split: str = "validation"
    ocr: bool = False

    @property
    def version(self) -> str:
        return super().version + (", OCR tokens" if self.ocr else "")

    def example(self, record: Record) -> Example:
        read = f"\nReference OCR token: {', '.join(record.texts('ocr_tokens', empty=True))}" if self.ocr else ""
        question = record.text("question").capitalize() + read + SHORT_ANSWER
        return Example(record.text("question_id"), "", question, record.texts("answers"), record.picture)
