"""ScienceQA-IMG: school questions with a picture and two to five options, the test split's 2,017 that have one."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.evals.benchmarks.base import Example, Row, answers_of, details_of
from vlprune.evals.benchmarks.loaded import OPTION_LETTER, Loaded
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import bare_letter, scienceqa_letter


def _plain(prediction: str, row: Row | Example) -> float:
    return float(bare_letter(prediction) == answers_of(row)[0])


def _llava(prediction: str, row: Row | Example) -> float:
    return float(scienceqa_letter(prediction, details_of(row)["options"]) == answers_of(row)[0])


@dataclass(frozen=True, kw_only=True)
class ScienceQA(Loaded):
    """Answers are letters. LLaVA's script finds a letter also in "The answer is B.", but not a small one."""

    name = "scienceqa"
    title = "ScienceQA-IMG"
    repository = "ScienceQA"
    config = "ScienceQA-IMG"
    conventions = {"accuracy": _plain, "accuracy, LLaVA's script": _llava}
    split: str = "test"

    def example(self, record: Record) -> Example:
        choices = record.texts("choices")
        right = record.number("answer")
        if not 0 <= right < len(choices):
            raise record.refusal("answer", f"the place of one of {len(choices)} choices")
        letters = [chr(ord("A") + place) for place in range(len(choices))]
        hint = record["hint"]
        context = f"Context: {hint}\n" if hint else ""
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
        question = f"{context}{record.text('question')}\n{options}{OPTION_LETTER}"
        # The data have no ids.
        return Example(str(record.place), "", question, (letters[right],), record.picture, {"options": len(choices)})
