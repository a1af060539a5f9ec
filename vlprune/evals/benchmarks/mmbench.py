"""MMBench: multiple choice, each question asked once for every rotation of its options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlprune.evals.benchmarks.base import (
    Example,
    Row,
    Summary,
    answers_of,
    by_category,
    details_of,
    failures,
    mean_number,
)
from vlprune.evals.benchmarks.loaded import OPTION_LETTER, Loaded, distinct_ids
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import infer_option, infer_text

LETTERS = "ABCD"
ROTATION = 1_000_000
"""Rotations of question 241 have the indices 1000241, 2000241, ..."""
CIRCULAR, VANILLA = "accuracy, circular", "accuracy, vanilla"


def _right(prediction: str, row: Row | Example) -> float:
    letter = infer_option(prediction) or infer_text(prediction, details_of(row)["options"])
    return float(letter == answers_of(row)[0])


@dataclass(frozen=True, kw_only=True)
class MMBench(Loaded):
    """The headline counts a question as right if it was answered right in all rotations; vanilla looks at the first alone.

    An answer in which no option can be found is wrong. The official script asks a language model which is meant, so it may be
    a little higher. Only the split dev has answers. ``language``: en, cn, ru.
    """

    name = "mmbench"
    title = "MMBench"
    repository = "MMBench"
    max_new_tokens = 1024
    conventions = {VANILLA: _right}
    split: str = "dev"
    language: str = "en"

    def source(self, config: str | None):
        return super().source(self.language)

    def examples(self, limit: int | None = None) -> list[Example]:
        """Rotations of a question come one after another, so that few questions are cut off by a limit.

        For that the whole split is read; it is a small one.
        """
        found = [self.example(record) for record in self.records(None)]
        turns = Counter(one.details["question"] for one in found)
        found.sort(key=lambda one: (one.details["question"], one.details["rotation"]))
        for one in found:
            one.details["rotations"] = turns[one.details["question"]]
        return list(distinct_ids(found))[:limit]

    def example(self, record: Record) -> Example:
        options = {letter: text for letter in LETTERS if (text := _known(record[letter])) is not None}
        answer = record.text("answer")
        if answer not in options:
            raise record.refusal("answer", f"one of the options {', '.join(options)} (the test split has none)")
        index = record.number("index")
        details = {"question": index % ROTATION, "rotation": index // ROTATION, "options": options}
        return Example(str(index), record.text("category"), _question(record, options), (answer,), record.picture, details)

    def summary(self, rows: Sequence[Row]) -> Summary:
        """Questions of which rotations are missing count for vanilla alone."""
        first = [float(row["score"]) for row in rows if row["details"]["rotation"] == 0]
        numbers = {CIRCULAR: _circular(rows), VANILLA: first}
        numbers = {name: mean_number(scores) for name, scores in numbers.items() if scores}
        categories = {name: _circular([rows[place] for place in places]) for name, places in by_category(rows).items()}
        return Summary(
            next(iter(numbers)),
            numbers,
            {name: mean_number(scores) for name, scores in categories.items() if scores},
            failures(rows),
        )


def _circular(rows: Sequence[Row]) -> list[float]:
    """For each question whose rotations are all there, whether all are right."""
    questions: dict[int, list[Row]] = {}
    for row in rows:
        questions.setdefault(row["details"]["question"], []).append(row)
    complete = [turns for turns in questions.values() if len(turns) == turns[0]["details"]["rotations"]]
    return [float(all(row["score"] == 1 for row in turns)) for turns in complete]


def _question(record: Record, options: dict[str, str]) -> str:
    hint = _known(record["hint"])
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    asked = f"{hint} {record.text('question')}" if hint is not None else record.text("question")
    return f"{asked} There are several options:\n{lines}\n{OPTION_LETTER}"


def _known(value: object) -> str | None:
    """Options that a question does not have are empty, or say "nan"."""
    return None if value is None or value != value or value in ("", "nan") else str(value)
