"""SynthVQA as a benchmark: drawn when it is asked for, so it needs no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlprune.evals import synthvqa
from vlprune.evals.benchmarks.base import Benchmark, Example, Number, Row, Summary, answers_of, by_category, failures
from vlprune.evals.metrics import METRIC_OF_KIND, Metric, estimate

READING = ("text", "form", "chart")
"""Kinds whose answers are read off a few particular tokens."""
SAMPLES = 600
"""How many are asked where no limit is given."""


@dataclass(frozen=True, kw_only=True)
class SynthVQA(Benchmark):
    """Six kinds of question, each scored by the metric of its real counterpart; the headline is the mean over the kinds.

    ``instruction`` is appended to each question on a line of its own: TinyVLM needs none, other models a hint to be brief.
    """

    name = "synthvqa"
    title = "SynthVQA"
    max_new_tokens = 16
    split: str = "test"
    instruction: str = ""

    @property
    def version(self) -> str:
        instruction = f", instruction {self.instruction!r}" if self.instruction else ""
        return f"SynthVQA {synthvqa.VERSION}, {self.split}{instruction}"

    def examples(self, limit: int | None = None) -> list[Example]:
        return [self._example(drawn) for drawn in synthvqa.examples(self.split, SAMPLES if limit is None else limit)]

    def _example(self, drawn: synthvqa.Example) -> Example:
        question = f"{drawn.question}\n{self.instruction}" if self.instruction else drawn.question
        return Example(drawn.id, drawn.kind, question, drawn.answers, drawn.image)

    def score(self, row: Row | Example, prediction: str | None) -> float:
        kind = row.category if isinstance(row, Example) else row["category"]
        return METRIC_OF_KIND[kind].sample(prediction, answers_of(row))

    def summary(self, rows: Sequence[Row]) -> Summary:
        indices = by_category(rows)
        groups = {
            kind: (METRIC_OF_KIND[kind], _contributions(METRIC_OF_KIND[kind], [rows[i] for i in indices[kind]]))
            for kind in METRIC_OF_KIND
            if kind in indices
        }
        numbers = {"mean over kinds": Number.of(estimate(list(groups.values())), len(rows))}
        reading = [groups[kind] for kind in READING if kind in groups]
        if reading:
            numbers["text, form, chart"] = Number.of(estimate(reading), sum(len(counts) for _, counts in reading))
        categories = {kind: Number.of(estimate([group]), len(group[1])) for kind, group in groups.items()}
        return Summary("mean over kinds", numbers, categories, failures(rows))


def _contributions(metric: Metric, rows: Sequence[Row]):
    return metric.contributions([row["prediction"] for row in rows], [row["answers"] for row in rows])
