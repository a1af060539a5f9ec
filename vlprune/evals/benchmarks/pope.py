"""POPE: is an object in the image? Asked of objects drawn at random, popular ones, and ones that often come together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlprune.evals.benchmarks.base import (
    Example,
    Number,
    Row,
    Summary,
    by_answers,
    by_category,
    failures,
    mean_number,
    scores_by,
)
from vlprune.evals.benchmarks.loaded import SHORT_ANSWER, Loaded
from vlprune.evals.benchmarks.source import Record
from vlprune.evals.metrics import POPE_F1, POPE_F1_STRICT, Metric, estimate, pope_answer, pope_correct

HEADLINE = "F1, mean of categories"


@dataclass(frozen=True, kw_only=True)
class POPE(Loaded):
    """The headline is the mean of the categories' F1, as papers quote it; pooled over all samples it differs a little.

    A score of a sample is whether its answer is right, read as the official script reads it: what does not say no says yes.
    lmms-eval counts an answer that is neither "yes" nor "no" as wrong; its F1 is among the numbers.
    """

    name = "pope"
    title = "POPE"
    repository = "POPE"
    max_new_tokens = 128
    conventions = {"accuracy": by_answers(pope_correct)}
    split: str = "test"

    def example(self, record: Record) -> Example:
        category = record.text("category")
        question = record.text("question").strip() + SHORT_ANSWER
        answer = record.one_of("answer", ("yes", "no"))
        return Example(f"{category}-{record.text('question_id')}", category, question, (answer,), record.picture)

    def summary(self, rows: Sequence[Row]) -> Summary:
        groups = {name: [rows[place] for place in places] for name, places in by_category(rows).items()}
        numbers = {
            HEADLINE: _over(POPE_F1, groups.values()),
            "F1, pooled": _over(POPE_F1, [rows]),
            "F1, pooled, lmms-eval": _over(POPE_F1_STRICT, [rows]),
            "accuracy": mean_number(scores_by(self.conventions["accuracy"], rows)),
            "share of yes": mean_number([_says_yes(row) for row in rows]),
        }
        return Summary(HEADLINE, numbers, {name: _over(POPE_F1, [group]) for name, group in groups.items()}, failures(rows))


def _over(metric: Metric, groups: Iterable[Sequence[Row]]) -> Number:
    """Mean of a metric over groups of rows."""
    groups = [rows for rows in groups if rows]
    counts = [metric.contributions([row["prediction"] for row in rows], [row["answers"] for row in rows]) for rows in groups]
    return Number.of(estimate([(metric, count) for count in counts]), sum(map(len, groups)))


def _says_yes(row: Row) -> float:
    return float(row["prediction"] is not None and pope_answer(row["prediction"]) == "yes")
