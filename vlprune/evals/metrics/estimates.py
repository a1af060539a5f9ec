"""From the scores of samples to one number, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Metric:
    """A score of one sample, what each sample adds to a total, and how totals become the score of many.

    ``counts`` returns what a sample adds: its score by default. ``combine`` turns totals ``(..., counts)`` of ``n``
    samples into scores ``(...)``. A sample without a prediction (``None``: it failed) is wrong.
    """

    name: str
    score: Callable[[str, Sequence[str]], float]
    counts: Callable[[str | None, Sequence[str]], tuple[float, ...]] | None = None
    combine: Callable[[np.ndarray], np.ndarray] | None = None

    def sample(self, prediction: str | None, answers: Sequence[str]) -> float:
        return 0.0 if prediction is None else self.score(prediction, answers)

    def contributions(self, predictions: Sequence[str | None], answers: Sequence[Sequence[str]]) -> np.ndarray:
        """What each sample adds to the totals: ``(samples, counts)``."""
        one = self.counts or (lambda prediction, references: (self.sample(prediction, references),))
        return np.array([one(p, a) for p, a in zip(predictions, answers, strict=True)], dtype=np.float64)

    def aggregate(self, totals: np.ndarray, samples: int) -> np.ndarray:
        """Scores ``(...)`` of totals ``(..., counts)`` over ``samples`` samples."""
        return self.combine(totals) if self.combine else totals[..., 0] / samples


MEAN = Metric("mean", lambda prediction, answers: 0.0)
"""How scores that are there already become one number."""


@dataclass(frozen=True)
class Estimate:
    """A score with its interval; all three in [0, 1]."""

    value: float
    low: float
    high: float


def estimate(
    groups: Sequence[tuple[Metric, np.ndarray]],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    over_groups: Callable[..., Any] = np.mean,
) -> Estimate:
    """Mean over ``groups`` of their scores (or their sum, by ``over_groups``), with a percentile bootstrap interval.

    A group is a metric and its contributions ``(units, counts)``: a unit is what is drawn, a sample or a pair of them.
    Units are drawn within each group, so the groups keep their sizes; a single group gives the interval of one metric.
    """
    rng = np.random.default_rng(seed)
    values = [metric.aggregate(contributions.sum(0), len(contributions)) for metric, contributions in groups]
    drawn = [
        metric.aggregate(resampled_totals(contributions, resamples, rng), len(contributions))
        for metric, contributions in groups
    ]
    low, high = percentile_interval(over_groups(drawn, axis=0), confidence)
    return Estimate(float(over_groups(values)), low, high)


def resampled_totals(contributions: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Totals ``(resamples, counts)`` of as many units as there are, drawn with replacement.

    Units that contribute the same are interchangeable, so how often each distinct row is drawn is multinomial: the same
    distribution as drawing units one by one, in a fraction of the memory.
    """
    distinct, multiplicity = np.unique(contributions, axis=0, return_counts=True)
    units = len(contributions)
    return rng.multinomial(units, multiplicity / units, size=resamples) @ distinct


def percentile_interval(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return float(low), float(high)
