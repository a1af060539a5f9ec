"""Two runs over the same samples: is one better, do they say the same, and what of the samples that one of them gets wrong.

Samples are paired, so what makes a question hard for both does not blur their difference. They are taken to be
independent; where several questions share an image, as in GQA, intervals are somewhat too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlprune.errors import VLPruneError
from vlprune.evals.benchmarks.base import Number, Row, mean_number
from vlprune.evals.metrics.estimates import percentile_interval, resampled_totals

RESAMPLES = 2000
PERMUTATIONS = 10_000
DRAWS_AT_ONCE = 1_000_000
"""So that memory does not grow with the number of samples."""
DECIMALS = 9
"""Differences that agree so far are the same number, come about in another order."""
MCNEMAR, PERMUTATION = "McNemar's exact test", "paired permutation test"
RIGHT = 0.5
"""A score below this counts as wrong, where it is not 0 or 1."""


@dataclass(frozen=True)
class Difference:
    """Mean score minus that of the others, with its 95 % interval, and ``p``: how often chance alone makes it so large.

    ``test`` is McNemar's exact one where all scores are 0 or 1, and otherwise a permutation of which run is which, sample by
    sample; both are two-sided.
    """

    value: float
    low: float
    high: float
    p: float
    test: str
    samples: int


def difference(rows: Sequence[Row], others: Sequence[Row], seed: int = 0) -> Difference:
    """Of the mean scores of ``rows`` and ``others``, which are of the same samples in the same order."""
    _check_same(rows, others)
    mine, theirs = (np.array([row["score"] for row in run], dtype=np.float64) for run in (rows, others))
    change = mine - theirs
    rng = np.random.default_rng(seed)
    drawn = resampled_totals(change[:, None], RESAMPLES, rng)[:, 0] / len(change)
    low, high = percentile_interval(drawn, 0.95)
    if np.isin(mine, (0, 1)).all() and np.isin(theirs, (0, 1)).all():
        p, test = mcnemar(int((change > 0).sum()), int((change < 0).sum())), MCNEMAR
    else:
        p, test = permutation(change, rng), PERMUTATION
    return Difference(float(change.mean()), low, high, p, test, len(change))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided probability that of ``better + worse`` fair coins so few, or fewer, show the rarer side."""
    coins = better + worse
    # Logarithms, since 2 ** coins leaves the range of a float.
    tail = sum(math.exp(_log_binomial(coins, k) - coins * math.log(2)) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def permutation(change: np.ndarray, rng: np.random.Generator, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of differences ``(samples,)``: how often random signs give a sum as far from 0, the one found counted in.

    Of samples whose difference is as large, all that matters is how many are positive, which is binomial.
    """
    sizes, counts = np.unique(np.abs(change[change != 0]).round(DECIMALS), return_counts=True)
    if not len(sizes):
        return 1.0
    # What sums to the same in another order must count as equal.
    found = abs(change.sum()) - 1e-6
    step = max(1, DRAWS_AT_ONCE // len(sizes))
    as_far = 0
    for start in range(0, permutations, step):
        positive = rng.binomial(counts, 0.5, size=(min(step, permutations - start), len(sizes)))
        as_far += int((np.abs((2 * positive - counts) @ sizes) >= found).sum())
    return (as_far + 1) / (permutations + 1)


def holm(p: Sequence[float]) -> list[float]:
    """p of tests that are made together, by Holm's correction.

    What is then below a level is significant at it: the chance that any test without a difference gets there is no larger.
    """
    adjusted, largest = [1.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


def agreement(rows: Sequence[Row], others: Sequence[Row]) -> float:
    """Share of samples with the same answer, but for case and surrounding space; a failed sample agrees with nothing."""
    _check_same(rows, others)
    return sum(map(_same_answer, rows, others)) / len(rows)


def _same_answer(row: Row, other: Row) -> bool:
    mine, theirs = row["prediction"], other["prediction"]
    return mine is not None and theirs is not None and mine.strip().casefold() == theirs.strip().casefold()


def on_failures(rows: Sequence[Row], others: Sequence[Row]) -> Number | None:
    """Mean score on the samples that ``others`` get wrong (below :data:`RIGHT`); None where there are none.

    With a smaller image as the others, this is what a method keeps that downsampling loses: many questions of common
    benchmarks can be answered from a thumbnail and tell methods apart from nothing.
    """
    _check_same(rows, others)
    scores = [row["score"] for row, other in zip(rows, others, strict=True) if other["score"] < RIGHT]
    return mean_number(scores) if scores else None


def _check_same(rows: Sequence[Row], others: Sequence[Row]) -> None:
    if not rows:
        raise VLPruneError("nothing to compare: no samples")
    if [row["id"] for row in rows] != [other["id"] for other in others]:
        raise VLPruneError("only runs over the same samples, in the same order, can be compared")
